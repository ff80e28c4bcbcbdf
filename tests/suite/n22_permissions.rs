//! What users can do that `nanite broker setup` made: their own work, and nothing with what is anothers'. They ask the broker
//! directly, as a node whose host was taken over would.

use std::fs;
use std::sync::Arc;

use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeBindOptions,
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    QueuePurgeOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use nanite::agent::{Agent, Context, actor, reply};
use nanite::certs::{CertificateDirectory, DirectoryCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::packet::{Identity, Payload};
use nanite::security::SecureSerializer;
use nanite::transport::{AmqpOptions, AmqpTransport};

use crate::harness::program::run;
use crate::harness::site::ready;
use crate::harness::wait_until;
use crate::n22_setup::Place;

/// A user at the broker, without any program of ours.
struct User(Connection);

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Refused,
}
use Verdict::{Allowed, Refused};

impl User {
    async fn log_in(place: &Place, identity: &str) -> Self {
        let url = place.url(identity).replacen('@', &format!(":{}@", place.password(identity)), 1);
        Self(Connection::connect(&url, ConnectionProperties::default()).await.unwrap())
    }

    /// What the broker says to an attempt, on a channel of its own: that the user has no permission for it closes the channel.
    async fn may<T>(&self, attempt: impl AsyncFnOnce(Channel) -> lapin::Result<T>) -> Verdict {
        let channel = self.0.create_channel().await.unwrap();
        match attempt(channel).await {
            Ok(_) => Allowed,
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(why) if why.kind() == &AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                    Refused
                }
                _ => panic!("neither done nor refused for want of permission: {error}"),
            },
        }
    }

    async fn get(&self, queue: &str) -> Verdict {
        self.may(async |channel| channel.basic_get(name(queue), BasicGetOptions::default()).await).await
    }

    async fn consume(&self, queue: &str) -> Verdict {
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        self.may(async |channel| channel.basic_consume(name(queue), name(""), options, arguments).await).await
    }

    async fn purge(&self, queue: &str) -> Verdict {
        self.may(async |channel| channel.queue_purge(name(queue), QueuePurgeOptions::default()).await).await
    }

    async fn delete(&self, queue: &str) -> Verdict {
        self.may(async |channel| channel.queue_delete(name(queue), QueueDeleteOptions::default()).await).await
    }

    async fn declare(&self, queue: &str) -> Verdict {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.may(async |channel| channel.queue_declare(name(queue), options, FieldTable::default()).await).await
    }

    /// Asks whether there is such a queue.
    async fn ask_about(&self, queue: &str) -> Verdict {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        self.may(async |channel| channel.queue_declare(name(queue), options, FieldTable::default()).await).await
    }

    async fn bind(&self, queue: &str, exchange: &str) -> Verdict {
        let (queue, exchange) = (name(queue), name(exchange));
        let options = (QueueBindOptions::default(), FieldTable::default());
        self.may(async |channel| channel.queue_bind(queue, exchange, name(""), options.0, options.1).await).await
    }

    async fn unbind(&self, queue: &str, exchange: &str) -> Verdict {
        let (queue, exchange) = (name(queue), name(exchange));
        self.may(async |channel| channel.queue_unbind(queue, exchange, name(""), FieldTable::default()).await).await
    }

    async fn bind_exchange(&self, to: &str, from: &str) -> Verdict {
        let options = (ExchangeBindOptions::default(), FieldTable::default());
        let (to, from) = (name(to), name(from));
        self.may(async |channel| channel.exchange_bind(to, from, name(""), options.0, options.1).await).await
    }

    async fn declare_exchange(&self, exchange: &str) -> Verdict {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let (exchange, kind) = (name(exchange), ExchangeKind::Fanout);
        self.may(async |channel| channel.exchange_declare(exchange, kind, options, FieldTable::default()).await).await
    }

    async fn delete_exchange(&self, exchange: &str) -> Verdict {
        let options = ExchangeDeleteOptions::default();
        self.may(async |channel| channel.exchange_delete(name(exchange), options).await).await
    }

    /// Publishes to an exchange, and waits for the broker's confirmation.
    async fn publish(&self, exchange: &str, key: &str) -> Verdict {
        let (exchange, key) = (name(exchange), name(key));
        self.may(async |channel| {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
            channel.basic_publish(exchange, key, options, b"rubbish", properties).await?.await
        })
        .await
    }
}

fn name(name: &str) -> ShortString {
    ShortString::try_new(name).unwrap()
}

impl Place {
    /// The names of all queues, and of the consumers' that have come.
    fn queues(&self) -> Vec<String> {
        let (_, all) = self.api(&format!("/api/queues/{}", self.vhost));
        all.as_array().unwrap().iter().map(|queue| queue["name"].as_str().unwrap().to_owned()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n22_an_agents_user_can_do_nothing_with_what_is_anothers() {
    let place = Place::new();
    assert_eq!(place.setup(&[]).code(), 0);
    let [a, b] = &place.agents;
    let (a, m) = (format!("nanite-{a}"), format!("mapper-{}", place.mapper));
    let _mapper = ready(&mut place.node("mapper", &place.mapper, &["mapper"]));
    let _b = ready(&mut place.node("agent", b, &["agent"]));
    // The shared two, the agent's two, the mapper's two: what there is to be taken.
    wait_until("all queues are there", async || place.queues().len() == 6).await;
    let queues = place.queues();
    for part in [&format!("nanite-{b}"), &format!("nanite-{b}."), &format!("{m}."), "request", "mapper-offline"] {
        assert!(queues.iter().any(|queue| queue.starts_with(part)), "no {part} among {queues:?}");
    }

    let user = User::log_in(&place, &a).await;
    // So that what is refused below is refused for whose it is, and not since the user can do nothing at all.
    let own = format!("{a}.17");
    assert_eq!(user.declare(&own).await, Allowed);
    assert_eq!(user.bind(&own, "advertise").await, Allowed);
    assert_eq!((user.get(&own).await, user.consume(&own).await, user.purge(&own).await), (Allowed, Allowed, Allowed));

    for queue in &queues {
        for exchange in ["advertise", "registration", "heartbeat", "amq.fanout"] {
            assert_eq!(user.bind(queue, exchange).await, Refused, "bind {queue} to {exchange}");
            assert_eq!(user.unbind(queue, exchange).await, Refused, "unbind {queue} from {exchange}");
        }
        assert_eq!(user.get(queue).await, Refused, "get {queue}");
        assert_eq!(user.consume(queue).await, Refused, "consume {queue}");
        assert_eq!(user.declare(queue).await, Refused, "declare {queue}");
        assert_eq!(user.purge(queue).await, Refused, "purge {queue}");
        assert_eq!(user.delete(queue).await, Refused, "delete {queue}");
    }
    // Nor has it a queue of another name: one that others would take for theirs, or that is like its own.
    for queue in
        ["queue", "nanite-c", &format!("{a}x"), &format!("x{a}"), &format!("{a}.x"), &format!("{a}.1.presence")]
    {
        assert_eq!(user.declare(queue).await, Refused, "declare {queue}");
    }
    // What agents say to the mappers is not for it, and it speaks to no agent as a mapper does.
    for exchange in ["registration", "heartbeat", "amq.fanout", "amq.topic"] {
        assert_eq!(user.bind(&own, exchange).await, Refused, "bind the own queue to {exchange}");
    }
    for exchange in ["advertise", "amq.fanout", "amq.direct", "amq.topic", "amq.headers"] {
        assert_eq!(user.publish(exchange, &own).await, Refused, "publish to {exchange}");
    }
    for exchange in ["advertise", "registration", "heartbeat", "amq.fanout", "other"] {
        assert_eq!(user.declare_exchange(exchange).await, Refused, "declare {exchange}");
        assert_eq!(user.bind_exchange("advertise", exchange).await, Refused, "bind advertise to {exchange}");
    }
    for exchange in ["amq.fanout", "amq.topic", "other"] {
        assert_eq!(user.bind_exchange(exchange, "advertise").await, Refused, "bind {exchange} to advertise");
    }
    for exchange in ["advertise", "registration", "heartbeat"] {
        assert_eq!(user.delete_exchange(exchange).await, Refused, "delete {exchange}");
    }
    // The work of an agent: it says that it lives, answers mappers, and asks them. Messages to a queue by its name go through the
    // default exchange; RabbitMQ cannot tell there which queues are meant. What it puts there is refused by whoever opens it.
    for (exchange, key) in [("registration", ""), ("heartbeat", ""), ("", "request"), ("", "mapper-offline")] {
        assert_eq!(user.publish(exchange, key).await, Allowed, "publish to {exchange} {key}");
    }
    // And it may know of queues, as everybody in the virtual host.
    assert_eq!(user.ask_about(&format!("nanite-{b}")).await, Allowed);

    // A mapper's user reads what is for any mapper, and nothing of an agent or of another mapper.
    let user = User::log_in(&place, &m).await;
    let theirs = |queue: &&String| queue.starts_with("nanite-");
    assert_eq!(queues.iter().filter(theirs).count(), 2);
    for queue in queues.iter().filter(theirs).map(String::as_str).chain(["mapper-other.17", "mapper-other"]) {
        assert_eq!(user.get(queue).await, Refused, "get {queue}");
        assert_eq!(user.declare(queue).await, Refused, "declare {queue}");
        assert_eq!(user.delete(queue).await, Refused, "delete {queue}");
    }
    assert_eq!(user.get("request").await, Allowed);
    for queue in ["request", "mapper-offline"] {
        assert_eq!(user.delete(queue).await, Refused, "delete {queue}");
    }
    // It makes itself known to the other mappers, and says nothing in an agent's place.
    assert_eq!((user.publish("registration", "").await, user.publish("heartbeat", "").await), (Allowed, Refused));
}

/// The library's agent with its user of the broker, with an actor that asks others through a mapper.
async fn asking(place: &Place, agent: &str) -> nanite::agent::Agent {
    let (identity, now) = (Identity::agent(agent).unwrap(), SystemClock.now());
    let certs = place.site.path("certs");
    let credentials = CertificateDirectory::new(&certs).credentials(&identity, None, now).unwrap();
    let store = DirectoryCertificateStore::open(&certs, now).unwrap();
    let trust = store.trust().unwrap();
    let serializer = SecureSerializer::builder(credentials, Arc::new(store), trust).build().unwrap();
    let options = AmqpOptions::new(&place.url(identity.as_str())).unwrap();
    let options = options.password(place.password(identity.as_str()).as_str());
    let transport = AmqpTransport::connect(options).await.unwrap();
    let asking = actor("ask").expose("echo", async |text: Payload, context: Context| {
        let answers = context.proxy().request("/agent/echo", text).await?;
        reply(answers.results().next().map(|(_, value)| value.clone()))
    });
    let agent = Agent::builder(Arc::new(serializer), Arc::new(transport)).actor(asking);
    agent.start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn n22_a_whole_system_works_with_these_users() {
    let place = Place::new();
    assert_eq!(place.setup(&[]).code(), 0);
    let [a, b] = &place.agents;
    // What the broker cannot forbid to an agent, since it reads the one and writes to the others: mappers' questions come to mappers,
    // too. They refuse them, and go on.
    let meddler = User::log_in(&place, &format!("nanite-{a}")).await;
    for exchange in ["registration", "heartbeat"] {
        assert_eq!(meddler.bind_exchange(exchange, "advertise").await, Allowed);
    }
    let _mapper = ready(&mut place.node("mapper", &place.mapper, &["mapper"]));
    let files = ["agent", "--files-dir", "inbox", "--files-domain", "photos"];
    fs::create_dir(place.site.path("inbox")).unwrap();
    let mut bob = ready(&mut place.node("agent", b, &files));
    let _alice = asking(&place, a).await;

    let ask = |arguments: &[&str]| {
        let ended = run(&mut place.node("mapper", &place.mapper, arguments));
        assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
        ended.out
    };
    let look = ["--look", "60s"];
    assert_eq!(
        ask(&[&["request", "/agent/echo", "by a mapper of its own", "--timeout", "60s"][..], &look].concat()),
        "by a mapper of its own\n"
    );
    assert_eq!(
        ask(&["request", "/agent/echo", "by one that runs", "--via-mapper", "--timeout", "60s"]),
        "by one that runs\n"
    );
    let asked = ["request", "/ask/echo", "agent to agent", "--timeout", "60s"];
    assert_eq!(ask(&[&asked[..], &look].concat()), "agent to agent\n");
    place.site.write("holiday.jpg", "a file", 0o600);
    assert_eq!(
        ask(&[&["send-file", "holiday.jpg", "--domain", "photos"][..], &look].concat()),
        format!("nanite-{b}\n")
    );
    bob.wait_for("has sent");
    assert_eq!(fs::read_to_string(place.site.path("inbox/holiday.jpg")).unwrap(), "a file");
    // What waits in the offline queue is put there by one mapper and read by the other.
    ask(&["push", "/agent/info", "null", "--offline", "--look", "10ms"]);
    wait_until("it is delivered", async || {
        let (_, queue) = place.api(&format!("/api/queues/{}/mapper-offline", place.vhost));
        queue["messages"] == 0
    })
    .await;
}
