use crate::harness::broker::Broker;
use nanite::transport::Transport;

#[tokio::test]
async fn smoke() {
    let broker = Broker::shared();
    let t = broker.connect().await;
    assert_eq!(t.depth("x").await, Ok(None));
    t.close().await;
}
