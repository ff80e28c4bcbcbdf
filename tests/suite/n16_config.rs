//! Options from the file, the environment and the command line.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::harness::program::run;
use crate::harness::site::{Site, ready};

#[test]
fn n16_node_runs_from_file_options() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    site.program("simple/echo", "cat");
    site.program("other/echo", "cat");
    let file = format!(
        "certs = \"certs\"\nbroker = \"{}\"\n\
         [agent]\ntoken = \"fred\"\nactors-dir = \"actors\"\nactors = [\"simple\"]\ntags = [\"filed\"]\nping-time = \"1s\"\n\
         concurrency = 2\nprefetch = 3\ndrain = \"5s\"\n[mapper]\nagent-timeout = \"30s\"\n",
        site.broker.url(),
    );
    site.write("nanite.toml", &file, 0o600);
    let mut fred = ready(&mut site.unconfigured(["agent"]));
    fred.wait_for("nanite-fred is ready: 1 service, ");
    let answer = run(&mut site.unconfigured([
        "request",
        "/simple/echo",
        "hi",
        "--tag",
        "filed",
        "--look",
        "60s",
        "--timeout",
        "60s",
    ]));
    assert_eq!((answer.code(), answer.out.as_str()), (0, "hi\n"), "{answer:?}");

    // The environment overrides the file, the command line overrides both.
    let mut bob = ready(site.unconfigured(["agent", "--tag", "given"]).env("NANITE_TOKEN", "bob"));
    bob.wait_for("nanite-bob is ready");
    let agents = run(&mut site.unconfigured(["agents", "--json", "--at-least", "2", "--look", "60s"]));
    let agents: serde_json::Value = serde_json::from_str(&agents.out).unwrap();
    assert_eq!(agents["agents"]["nanite-bob"]["tags"], json!(["given"]));
    assert_eq!(agents["agents"]["nanite-fred"]["tags"], json!(["filed"]));
    let given = run(site.unconfigured(["agent", "--token", "unknown"]).env("NANITE_TOKEN", "bob"));
    assert_eq!(given.code(), 6);
    assert!(given.err.contains("no certificate for nanite-unknown"), "{}", given.err);

    // In another directory the file must be named; paths in it are relative to it.
    let elsewhere = tempfile::tempdir().unwrap();
    let named = site.path("nanite.toml");
    let ask = ["request", "/simple/echo", "hi", "--target", "fred", "--timeout", "60s"];
    let without = run(site.unconfigured(ask).current_dir(elsewhere.path()));
    assert_eq!(without.code(), 2, "{without:?}");
    let by_option = run(site.unconfigured(ask).arg("--config").arg(&named).current_dir(elsewhere.path()));
    assert_eq!((by_option.code(), by_option.out.as_str()), (0, "hi\n"), "{by_option:?}");
    let by_variable = run(site.unconfigured(ask).env("NANITE_CONFIG", &named).current_dir(elsewhere.path()));
    assert_eq!((by_variable.code(), by_variable.out.as_str()), (0, "hi\n"), "{by_variable:?}");
}

#[test]
fn n16_invalid_file_is_an_error() {
    let site = Site::new(&["mapper ctl"]);
    let refused = |text: &str, mode: u32, parts: &[&str]| {
        site.write("nanite.toml", text, mode);
        let ended = run(&mut site.unconfigured(["agents"]));
        assert_eq!(ended.code(), 2, "{text}: {ended:?}");
        assert!(parts.iter().all(|part| ended.err.contains(part)), "{text}: {}", ended.err);
        assert!(!ended.err.contains("hidden"), "{text}: {}", ended.err);
    };
    refused(
        "certs = \"certs\"\nbrocker = \"amqp://u:hidden@h\"\n",
        0o644,
        &["nanite.toml:2: unknown field `brocker`", "`broker`"],
    );
    refused("[agent]\nping-time = 15\n", 0o644, &["nanite.toml:2: "]);
    refused("[mapper]\nactors-dir = \"x\"\n", 0o644, &["nanite.toml:2: unknown field `actors-dir`"]);
    refused("insecure-plaintext = true\n", 0o644, &["unknown field `insecure-plaintext`"]);
    refused("broker = \"amqp://u:hidden@h\n", 0o644, &["nanite.toml:1: "]);
    refused("broker = \"amqp://u:hidden@h\"\n", 0o644, &["mode 0644", "chmod 600 nanite.toml"]);
    refused("certs = \"certs\"\n", 0o666, &["world-writable", "--config nanite.toml"]);
    let missing = run(&mut site.unconfigured(["agents", "--config", "none.toml"]));
    assert_eq!(missing.code(), 2);
    assert!(missing.err.contains("cannot read the configuration none.toml"), "{}", missing.err);
    // Commands without options in the file do not read it.
    assert_eq!(run(&mut site.unconfigured(["certs", "list", "--dir", "certs"])).code(), 0);
}

#[test]
fn n16_token_defaults_to_only_key_and_lists_several() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    let several = site.run(&["agent"]);
    assert_eq!(several.code(), 2);
    assert!(several.err.contains("there are several: bob, fred"), "{}", several.err);
    assert!(several.err.contains("--token bob"), "{}", several.err);
    std::fs::remove_file(site.path("certs/agent-bob-key.pem")).unwrap();
    let mut fred = site.start(&["agent"]);
    fred.wait_for("nanite-fred is ready");
    std::fs::remove_file(site.path("certs/mapper-ctl-key.pem")).unwrap();
    let none = site.run(&["agents"]);
    assert_eq!(none.code(), 2);
    assert!(
        none.err.contains("certs holds no mapper's key") && none.err.contains("nanite certs issue mapper"),
        "{}",
        none.err
    );
}

#[test]
fn n16_plaintext_node_gets_saved_generated_name() {
    let site = Site::new(&[]);
    let plain = |command: &'static str| {
        let mut plain = site.unconfigured([command, "--insecure-plaintext"]);
        plain.env("NANITE_BROKER", site.broker.url());
        plain
    };
    let name = |command: &'static str| {
        let running = ready(&mut plain(command));
        let (_, stderr) = running.output();
        let line = stderr.lines().find(|line| line.contains(" is ready: ")).unwrap();
        line.split_once(" is ready: ").unwrap().0.to_owned()
    };
    let agent = name("agent");
    assert!(agent.starts_with("nanite-"), "{agent}");
    assert_eq!(name("agent"), agent);
    assert_ne!(name("mapper").trim_start_matches("mapper-"), agent.trim_start_matches("nanite-"));
    let kept = site.path("state/nanite/agent-token");
    assert_eq!(format!("nanite-{}", std::fs::read_to_string(&kept).unwrap().trim()), agent);
    assert_eq!(std::fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);
    let nowhere = run(plain("agent").env_remove("HOME").env_remove("XDG_STATE_HOME"));
    assert_eq!(nowhere.code(), 2, "{nowhere:?}");
    assert!(nowhere.err.contains("--token NAME"), "{}", nowhere.err);
}

#[test]
fn s14_broker_password_sources_and_warning() {
    let site = Site::new(&["mapper ctl"]);
    let user = site.broker.add_user("hidden-right");
    site.broker.permit(&user, ".*", ".*", ".*");
    let url = |password: &str| site.broker.url_for(&user, password);
    let bare = url("x").replace(":x@", "@");
    site.write("right", "hidden-right\n", 0o600);
    site.write("wrong", "hidden-wrong\n", 0o600);
    let agents = |options: &[&str], environment: &[(&str, &str)], file: &str| {
        site.write("nanite.toml", &format!("certs = \"certs\"\n{file}"), 0o600);
        let all = ["agents", "--look", "10ms"].iter().chain(options);
        let ended = run(site.unconfigured(all).envs(environment.iter().copied()));
        assert!(!format!("{ended:?}").contains("hidden"), "{ended:?}");
        ended
    };
    let works = |options: &[&str], environment: &[(&str, &str)], file: &str| {
        let ended = agents(options, environment, file);
        assert_eq!(ended.code(), 0, "{ended:?}");
        ended.err.contains("a password on the command line can be read")
    };
    assert!(!works(&[], &[], &format!("broker = \"{}\"", url("hidden-right"))));
    assert!(!works(&[], &[], &format!("broker = \"{bare}\"\nbroker-password-file = \"right\"")));
    assert!(!works(&[], &[("NANITE_BROKER", &url("hidden-right"))], "broker = \"amqp://nowhere\""));
    assert!(!works(&["--broker", &bare], &[("NANITE_BROKER_PASSWORD", "hidden-right")], ""));
    let file = format!("broker = \"{}\"", url("hidden-wrong"));
    assert!(!works(&["--broker-password-file", "right"], &[("NANITE_BROKER_PASSWORD", "hidden-wrong")], &file));
    assert!(works(&["--broker", &url("hidden-right")], &[("NANITE_BROKER_PASSWORD", "hidden-wrong")], ""));
    // The password of one URL is not used for another broker.
    let other = agents(&["--broker", &bare], &[], &format!("broker = \"{}\"", url("hidden-right")));
    assert_eq!(other.code(), 7, "{other:?}");
    let wrong = agents(&["--broker", &bare, "--broker-password-file", "wrong"], &[], "");
    assert_eq!(wrong.code(), 7);
    assert!(wrong.err.contains("refused the user name or password"), "{}", wrong.err);
    site.mode("right", 0o644);
    let open = agents(&["--broker-password-file", "right"], &[], "");
    assert_eq!(open.code(), 2);
    assert!(open.err.contains("mode 0644") && open.err.contains("chmod 600 right"), "{}", open.err);
}
