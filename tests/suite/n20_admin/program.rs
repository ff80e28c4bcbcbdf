//! Tests of the program: `nanite admin` with agents and a real broker, each in its own process.

use std::net::TcpListener;

use nix::sys::signal::Signal;

use crate::harness::program::Running;
use crate::harness::site::{Site, ready};
use crate::harness::web;

/// The port in the URL that the program prints.
pub fn port(tower: &Running) -> u16 {
    let (_, err) = tower.output();
    let (_, rest) = err.split_once("http://127.0.0.1:").unwrap();
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// Loads the page until it contains `text`.
fn wait_for(port: u16, path: &str, cookie: &str, text: &str) -> web::Answer {
    let mut last = None;
    for _ in 0..3000 {
        let answer = web::get(port, path, cookie);
        if answer.body.contains(text) {
            return answer;
        }
        last = Some(answer);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("{path} does not show {text:?}: {last:?}");
}

#[test]
fn n20_program_shows_agents_of_real_broker() {
    let site = Site::new(&["agent fred", "mapper tower"]);
    site.program("simple/shout", "tr a-z A-Z");
    let _agent = site.agent("fred", &["--tag", "big"]);
    let mut tower = site.start(&["admin", "--token", "tower", "--listen", "127.0.0.1:0", "--allow-requests"]);
    tower.wait_for("lets one browser in, once");
    let port = port(&tower);
    let (out, err) = tower.output();
    assert_eq!(out, "", "stdout is for data only");
    let link = err.split_whitespace().find_map(|word| word.strip_prefix(&format!("http://127.0.0.1:{port}"))).unwrap();
    let entered = web::get(port, link, "");
    assert_eq!(entered.status, 303);
    let cookie = format!("Cookie: {}\r\n", entered.cookie("nanite-").unwrap());
    assert_eq!(web::get(port, link, "").status, 403, "a link works once");

    wait_for(port, "/", &cookie, "fred");
    let agent = web::get(port, "/agents/fred", &cookie);
    for part in ["nanite-fred", "verified", "/simple/shout", "big"] {
        assert!(agent.body.contains(part), "no {part} in {}", agent.body);
    }
    let form = web::get(port, "/request", &cookie);
    let fields = [("service", "/simple/shout"), ("payload", "hello"), ("timeout", "60"), ("csrf", form.csrf())];
    let sent = web::post(port, "/request", &cookie, &fields);
    assert_eq!(sent.status, 303, "{sent:?}");
    wait_for(port, sent.header("location"), &cookie, "HELLO");

    tower.signal(Signal::SIGTERM);
    let ended = tower.wait();
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(
        ended.err.matches("token=").count(),
        1,
        "no second link is printed: stderr is not a terminal: {}",
        ended.err
    );
}

#[test]
fn n20_program_accepts_password_hash_file() {
    let site = Site::new(&["mapper tower"]);
    let hash = site.run_with_input(&["admin", "hash-password"], b"correct horse\n");
    assert_eq!((hash.code(), hash.err.as_str()), (0, ""), "{hash:?}");
    assert!(hash.out.starts_with("$scrypt$ln=15,r=8,p=3$") && !hash.out.contains("horse"), "{hash:?}");
    site.write("tower.hash", &hash.out, 0o600);
    site.write("nanite.toml", "[admin]\nlisten = \"127.0.0.1:0\"\npassword-hash-file = \"tower.hash\"\n", 0o600);
    let mut tower = ready(&mut site.nanite(["admin", "--token", "tower"]));
    tower.wait_for("log in with the password");
    let port = port(&tower);
    let page = web::get(port, "/login", "");
    let cookie = format!("Cookie: {}\r\n", page.cookie("nanite-login").unwrap());
    let login = |password| web::post(port, "/login", &cookie, &[("secret", password), ("csrf", page.csrf())]).status;
    assert_eq!((login("correct horsf"), login("correct horse")), (403, 303));
    let (_, err) = tower.output();
    assert!(!err.contains("token=") && !err.contains("horse"), "{err}");
}

#[test]
fn n20_program_reports_startup_errors_with_remedy() {
    let site = Site::new(&["mapper tower"]);
    let refused = |arguments: &[&str], code: i32, parts: &[&str]| {
        let all: Vec<&str> = ["admin", "--token", "tower"].iter().chain(arguments).copied().collect();
        let ended = site.run(&all);
        assert_eq!(ended.code(), code, "{ended:?}");
        parts.iter().for_each(|part| assert!(ended.err.contains(part), "no {part:?} in {}", ended.err));
    };
    refused(&["--listen", "0.0.0.0:0"], 2, &["is reachable from other machines", "--public-url https://NAME"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refused(&["--listen", &address], 1, &["cannot listen on", "--listen 127.0.0.1:PORT"]);
    refused(&["--public-url", "tower"], 2, &["a public URL is"]);
    refused(&["--password-hash-file", "none"], 2, &["cannot be read"]);
    site.write("plain", "correct horse\n", 0o600);
    refused(
        &["--password-hash-file", "plain"],
        2,
        &["a password hash has the form $scrypt$", "nanite admin hash-password"],
    );
    site.write("open", "x\n", 0o644);
    refused(&["--password-hash-file", "open"], 2, &["mode 0644", "chmod 600"]);
    let short = site.run_with_input(&["admin", "hash-password"], b"short\n");
    assert_eq!((short.code(), short.out.as_str()), (2, ""), "{short:?}");
    assert!(short.err.contains("a password must have 8 to 1024 bytes"), "{short:?}");
    let both = site.run(&["admin", "--token", "tower", "hash-password"]);
    assert_eq!(both.code(), 2, "{both:?}");
}
