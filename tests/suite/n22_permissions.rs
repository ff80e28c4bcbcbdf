//! The users that `nanite broker setup` creates can do their own work, and cannot use the resources of others. They use the broker
//! directly, as an attacker on a node's host could.

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
use crate::n22_setup::SetupTest;

/// A user at the broker, with a plain AMQP client.
struct User(Connection);

#[derive(Debug, PartialEq, Eq)]
enum Access {
    Allowed,
    Refused,
}
use Access::{Allowed, Refused};

impl User {
    async fn log_in(test: &SetupTest, identity: &str) -> Self {
        let url = test.url(identity).replacen('@', &format!(":{}@", test.password(identity)), 1);
        Self(Connection::connect(&url, ConnectionProperties::default()).await.unwrap())
    }

    /// Whether the broker allows an attempt. Each has its own channel, because a refusal closes the channel.
    async fn attempt<T>(&self, attempt: impl AsyncFnOnce(Channel) -> lapin::Result<T>) -> Access {
        let channel = self.0.create_channel().await.unwrap();
        match attempt(channel).await {
            Ok(_) => Allowed,
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(why) if why.kind() == &AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                    Refused
                }
                _ => panic!("neither allowed nor refused: {error}"),
            },
        }
    }

    async fn get(&self, queue: &str) -> Access {
        self.attempt(async |channel| channel.basic_get(name(queue), BasicGetOptions::default()).await).await
    }

    async fn consume(&self, queue: &str) -> Access {
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        self.attempt(async |channel| channel.basic_consume(name(queue), name(""), options, arguments).await).await
    }

    async fn purge(&self, queue: &str) -> Access {
        self.attempt(async |channel| channel.queue_purge(name(queue), QueuePurgeOptions::default()).await).await
    }

    async fn delete(&self, queue: &str) -> Access {
        self.attempt(async |channel| channel.queue_delete(name(queue), QueueDeleteOptions::default()).await).await
    }

    async fn declare(&self, queue: &str) -> Access {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.attempt(async |channel| channel.queue_declare(name(queue), options, FieldTable::default()).await).await
    }

    /// Checks whether the queue exists.
    async fn check_exists(&self, queue: &str) -> Access {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        self.attempt(async |channel| channel.queue_declare(name(queue), options, FieldTable::default()).await).await
    }

    async fn bind(&self, queue: &str, exchange: &str) -> Access {
        let (queue, exchange) = (name(queue), name(exchange));
        let options = (QueueBindOptions::default(), FieldTable::default());
        self.attempt(async |channel| channel.queue_bind(queue, exchange, name(""), options.0, options.1).await).await
    }

    async fn unbind(&self, queue: &str, exchange: &str) -> Access {
        let (queue, exchange) = (name(queue), name(exchange));
        self.attempt(async |channel| channel.queue_unbind(queue, exchange, name(""), FieldTable::default()).await).await
    }

    async fn bind_exchange(&self, to: &str, from: &str) -> Access {
        let options = (ExchangeBindOptions::default(), FieldTable::default());
        let (to, from) = (name(to), name(from));
        self.attempt(async |channel| channel.exchange_bind(to, from, name(""), options.0, options.1).await).await
    }

    async fn declare_exchange(&self, exchange: &str) -> Access {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let (exchange, kind) = (name(exchange), ExchangeKind::Fanout);
        self.attempt(async |channel| channel.exchange_declare(exchange, kind, options, FieldTable::default()).await)
            .await
    }

    async fn delete_exchange(&self, exchange: &str) -> Access {
        let options = ExchangeDeleteOptions::default();
        self.attempt(async |channel| channel.exchange_delete(name(exchange), options).await).await
    }

    /// Publishes to an exchange, and waits for the confirm.
    async fn publish(&self, exchange: &str, key: &str) -> Access {
        let (exchange, key) = (name(exchange), name(key));
        self.attempt(async |channel| {
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

impl SetupTest {
    /// The names of all queues.
    fn queues(&self) -> Vec<String> {
        let (_, all) = self.api(&format!("/api/queues/{}", self.vhost));
        all.as_array().unwrap().iter().map(|queue| queue["name"].as_str().unwrap().to_owned()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n22_users_cannot_use_the_resources_of_others() {
    let test = SetupTest::new();
    assert_eq!(test.setup(&[]).code(), 0);
    let [a, b] = &test.agents;
    let (a, m) = (format!("nanite-{a}"), format!("mapper-{}", test.mapper));
    let _mapper = ready(&mut test.node("mapper", &test.mapper, &["mapper"]));
    let _b = ready(&mut test.node("agent", b, &["agent"]));
    // Two shared queues, two of the agent, two of the mapper.
    wait_until("all queues exist", async || test.queues().len() == 6).await;
    let queues = test.queues();
    for part in [&format!("nanite-{b}"), &format!("nanite-{b}."), &format!("{m}."), "request", "mapper-offline"] {
        assert!(queues.iter().any(|queue| queue.starts_with(part)), "no {part} among {queues:?}");
    }

    let user = User::log_in(&test, &a).await;
    // Its own queue works, so the refusals below are not because the user may do nothing at all.
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
    // It cannot declare queues with other names, such as those of others or similar to its own.
    for queue in
        ["queue", "nanite-c", &format!("{a}x"), &format!("x{a}"), &format!("{a}.x"), &format!("{a}.1.presence")]
    {
        assert_eq!(user.declare(queue).await, Refused, "declare {queue}");
    }
    // It cannot read what agents send to mappers, and cannot send to agents as a mapper does.
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
    // The work of an agent: heartbeats, answers and requests to mappers. Messages to a queue by its name go through the default
    // exchange, where RabbitMQ cannot restrict the queues; the recipients refuse forged messages.
    for (exchange, key) in [("registration", ""), ("heartbeat", ""), ("", "request"), ("", "mapper-offline")] {
        assert_eq!(user.publish(exchange, key).await, Allowed, "publish to {exchange} {key}");
    }
    // It may check whether queues exist, like every user of the virtual host.
    assert_eq!(user.check_exists(&format!("nanite-{b}")).await, Allowed);

    // A mapper's user can read the queues shared by all mappers, but not those of an agent or another mapper.
    let user = User::log_in(&test, &m).await;
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
    // It can announce itself to other mappers, but cannot send heartbeats as an agent does.
    assert_eq!((user.publish("registration", "").await, user.publish("heartbeat", "").await), (Allowed, Refused));
}

/// An agent of the library with its own broker user, and an actor that sends requests through a mapper.
async fn requesting_agent(test: &SetupTest, agent: &str) -> nanite::agent::Agent {
    let (identity, now) = (Identity::agent(agent).unwrap(), SystemClock.now());
    let certs = test.site.path("certs");
    let credentials = CertificateDirectory::new(&certs).credentials(&identity, None, now).unwrap();
    let store = DirectoryCertificateStore::open(&certs, now).unwrap();
    let trust = store.trust().unwrap();
    let serializer = SecureSerializer::builder(credentials, Arc::new(store), trust).build().unwrap();
    let options = AmqpOptions::new(&test.url(identity.as_str())).unwrap();
    let options = options.password(test.password(identity.as_str()).as_str());
    let transport = AmqpTransport::connect(options).await.unwrap();
    let requests = actor("ask").expose("echo", async |text: Payload, context: Context| {
        let answers = context.proxy().request("/agent/echo", text).await?;
        reply(answers.results().next().map(|(_, value)| value.clone()))
    });
    let agent = Agent::builder(Arc::new(serializer), Arc::new(transport)).actor(requests);
    agent.start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn n22_complete_system_works_with_these_users() {
    let test = SetupTest::new();
    assert_eq!(test.setup(&[]).code(), 0);
    let [a, b] = &test.agents;
    // The broker cannot prevent that an agent binds the exchanges so that mappers receive the questions of mappers: they refuse them.
    let attacker = User::log_in(&test, &format!("nanite-{a}")).await;
    for exchange in ["registration", "heartbeat"] {
        assert_eq!(attacker.bind_exchange(exchange, "advertise").await, Allowed);
    }
    let _mapper = ready(&mut test.node("mapper", &test.mapper, &["mapper"]));
    let files = ["agent", "--files-dir", "inbox", "--files-domain", "photos"];
    fs::create_dir(test.site.path("inbox")).unwrap();
    let mut bob = ready(&mut test.node("agent", b, &files));
    let _alice = requesting_agent(&test, a).await;

    let run_command = |arguments: &[&str]| {
        let ended = run(&mut test.node("mapper", &test.mapper, arguments));
        assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
        ended.out
    };
    let look = ["--look", "60s"];
    assert_eq!(
        run_command(&[&["request", "/agent/echo", "by its own mapper", "--timeout", "60s"][..], &look].concat()),
        "by its own mapper\n"
    );
    assert_eq!(
        run_command(&["request", "/agent/echo", "by a running mapper", "--via-mapper", "--timeout", "60s"]),
        "by a running mapper\n"
    );
    let request = ["request", "/ask/echo", "agent to agent", "--timeout", "60s"];
    assert_eq!(run_command(&[&request[..], &look].concat()), "agent to agent\n");
    test.site.write("holiday.jpg", "a file", 0o600);
    assert_eq!(
        run_command(&[&["send-file", "holiday.jpg", "--domain", "photos"][..], &look].concat()),
        format!("nanite-{b}\n")
    );
    bob.wait_for("received ");
    assert_eq!(fs::read_to_string(test.site.path("inbox/holiday.jpg")).unwrap(), "a file");
    // One mapper puts a request into the offline queue, and the other delivers it.
    run_command(&["push", "/agent/info", "null", "--offline", "--look", "10ms"]);
    wait_until("it is delivered", async || {
        let (_, queue) = test.api(&format!("/api/queues/{}/mapper-offline", test.vhost));
        queue["messages"] == 0
    })
    .await;
}
