//! The same round trip by lapin alone, as its documentation has it: a client with a queue for replies, a server that echoes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use tokio::sync::oneshot;

/// A client with its server behind it.
pub struct Bare {
    _connections: [Connection; 2],
    channel: Channel,
    work: ShortString,
    replies: ShortString,
    pending: Arc<Mutex<HashMap<String, oneshot::Sender<usize>>>>,
    next: AtomicU64,
}

impl Bare {
    /// Connects both. With `confirms`, each publish is mandatory and waits for its confirm, and the server acknowledges a request
    /// only after its reply was confirmed; without, nobody waits for the broker.
    pub async fn start(url: &str, confirms: bool) -> Self {
        let connect = || Connection::connect(url, ConnectionProperties::default());
        let (client, server) = (connect().await.unwrap(), connect().await.unwrap());
        let kind = if confirms { "confirms" } else { "acks" };
        let (work, replies) = (format!("bare-{kind}-work"), format!("bare-{kind}-replies"));

        let requests = consume(&server, &work).await;
        tokio::spawn(echo(requests, publish_channel(&server, confirms).await));

        let mut answers = consume(&client, &replies).await;
        let pending: Arc<Mutex<HashMap<String, oneshot::Sender<usize>>>> = Arc::default();
        let waiting = Arc::clone(&pending);
        tokio::spawn(async move {
            while let Some(Ok(answer)) = answers.next().await {
                answer.ack(BasicAckOptions::default()).await.unwrap();
                let id = answer.properties.correlation_id().as_ref().unwrap().to_string();
                if let Some(asked) = waiting.lock().unwrap().remove(&id) {
                    let _ = asked.send(answer.data.len());
                }
            }
        });
        let channel = publish_channel(&client, confirms).await;
        let next = AtomicU64::new(0);
        let (work, replies) = (work.into(), replies.into());
        Self { _connections: [client, server], channel, work, replies, pending, next }
    }

    /// One request and its answer.
    pub async fn round_trip(&self, payload: &[u8]) {
        let id = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let (asked, answered) = oneshot::channel();
        self.pending.lock().unwrap().insert(id.clone(), asked);
        let properties =
            BasicProperties::default().with_reply_to(self.replies.clone()).with_correlation_id(id.as_str().into());
        publish(&self.channel, self.work.clone(), payload, properties).await;
        assert_eq!(answered.await.unwrap(), payload.len());
    }
}

async fn publish(channel: &Channel, queue: ShortString, body: &[u8], properties: BasicProperties) {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let confirm = channel.basic_publish(ShortString::default(), queue, options, body, properties).await.unwrap();
    confirm.await.unwrap();
}

async fn echo(mut requests: Consumer, channel: Channel) {
    while let Some(Ok(request)) = requests.next().await {
        let channel = channel.clone();
        tokio::spawn(async move {
            let id = request.properties.correlation_id().clone().unwrap();
            let reply_to = request.properties.reply_to().clone().unwrap();
            let properties = BasicProperties::default().with_correlation_id(id);
            publish(&channel, reply_to, &request.data, properties).await;
            request.ack(BasicAckOptions::default()).await.unwrap();
        });
    }
}

async fn publish_channel(connection: &Connection, confirms: bool) -> Channel {
    let channel = connection.create_channel().await.unwrap();
    if confirms {
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    }
    channel
}

async fn consume(connection: &Connection, queue: &str) -> Consumer {
    let channel = connection.create_channel().await.unwrap();
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap();
    channel.basic_qos(256, BasicQosOptions::default()).await.unwrap();
    let consumer =
        channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default());
    consumer.await.unwrap()
}
