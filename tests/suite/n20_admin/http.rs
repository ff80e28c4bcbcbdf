//! What is refused, to whom, and what every answer carries: plain HTTP, to the byte.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Site, counter, work};
use crate::harness::system::{System, knows, start};
use crate::harness::web::{self, Answer, events};

fn assert_secure(what: &str, answer: &Answer) {
    let policy = answer.header("content-security-policy");
    for part in
        ["default-src 'none';", "script-src 'self';", "style-src 'self';", "frame-ancestors 'none'", "base-uri 'none'"]
    {
        assert!(policy.contains(part), "{what}: no {part} in {policy:?}");
    }
    assert!(!policy.contains("unsafe"), "{what}: {policy}");
    for (name, value) in [
        ("x-frame-options", "DENY"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "same-origin"),
        ("cache-control", "no-store"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        assert_eq!(answer.header(name), value, "{what}: {name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_every_answer_carries_the_headers() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let raw = |text: &str| web::exchange(site.port, text.replace("HOST", &web::host(site.port)).as_bytes());
    for (what, status, answer) in [
        ("the table", 200, site.get("/", &cookie)),
        ("the form", 200, site.get("/request", &cookie)),
        ("nobody's table", 303, site.get("/", "")),
        ("nobody's events", 401, site.get("/events", "Accept: text/event-stream\r\n")),
        ("the login", 200, site.get("/login", "")),
        ("a wrong token", 403, site.get("/login?token=x", "")),
        ("the style", 200, site.get("/assets/tower.css", "")),
        ("no page", 404, site.get("/x", &cookie)),
        ("no agent", 404, site.get("/agents/x", &cookie)),
        ("no asset", 404, site.get("/assets/..%2ftower.rs", "")),
        ("no secret", 403, site.post("/request", &cookie, &[])),
        ("no such way", 405, raw("DELETE / HTTP/1.1\r\nHOSTConnection: close\r\n\r\n")),
        ("no way here", 405, site.post("/", &cookie, &[])),
        ("no host", 421, raw("GET / HTTP/1.0\r\n\r\n")),
        ("no form", 415, raw("POST /login HTTP/1.1\r\nHOSTContent-Length: 2\r\nConnection: close\r\n\r\n{}")),
    ] {
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert_secure(what, &answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_a_request_for_another_host_is_refused() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let ask =
        |head: &str| web::exchange(site.port, format!("{head}\r\n{cookie}Connection: close\r\n\r\n").as_bytes()).status;
    let port = site.port;
    assert_eq!(ask(&format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}")), 200);
    assert_eq!(ask(&format!("GET / HTTP/1.1\r\nHost: LocalHost:{port}")), 200);
    for foreign in [
        format!("evil.example:{port}"),
        "evil.example".to_owned(),
        "127.0.0.1".to_owned(),
        format!("127.0.0.1:{}", port ^ 1),
        format!("127.0.0.1.evil.example:{port}"),
        format!("localhost:{port}, evil.example"),
        String::new(),
    ] {
        assert_eq!(ask(&format!("GET / HTTP/1.1\r\nHost: {foreign}")), 421, "{foreign:?}");
    }
    let two = format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example");
    assert_eq!(ask(&two), 421);
    let absolute = format!("GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1:{port}");
    assert_eq!(ask(&absolute), 421);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_who_is_not_logged_in_sees_and_does_nothing() {
    let site = Site::new().await;
    let ran = counter();
    let _agent = start(site.system.agent("fred").actor(work(&ran))).await;
    knows(&site.mapper, &["fred"]).await;
    let paths = ["/", "/events", "/agents/fred", "/agents/fred/events", "/request", "/requests", "/requests/x/events"];
    for cookie in ["", "Cookie: nanite=x\r\n", &format!("Cookie: nanite-{}={}\r\n", site.port, "0".repeat(64))] {
        for path in paths {
            let page = site.get(path, cookie);
            assert_eq!((page.status, page.header("location")), (303, "/login"), "{path}");
            assert!(!page.body.contains("fred"), "{path}: {page:?}");
            let events = site.get(path, &format!("{cookie}Accept: text/event-stream\r\n"));
            assert_eq!(events.status, 401, "{path}: a script is not led to a page");
        }
        for path in ["/request", "/requests/x/stop", "/logout"] {
            let form = [("service", "/work/echo"), ("timeout", "5"), ("csrf", "x")];
            assert_eq!(site.post(path, cookie, &form).status, 401, "{path}");
        }
    }
    assert_eq!(ran.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_an_invitation_lets_one_browser_in_once() {
    let site = Site::new().await;
    let link = site.invitations.issue().unwrap();
    let answer = site.get(&link, "");
    let cookie = &answer.headers.iter().find(|(name, _)| name == "set-cookie").unwrap().1;
    for part in ["; HttpOnly", "; SameSite=Strict", "; Path=/"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!link.contains(cookie.split(['=', ';']).nth(1).unwrap()), "the cookie is no token");
    assert_eq!(site.get(&link, "").status, 403, "it was used");

    // By the form of the login page, which has a secret of its own.
    let link = site.invitations.issue().unwrap();
    let token = link.split_once('=').unwrap().1;
    let page = site.get("/login", "");
    let cookie = format!("Cookie: {}\r\n", page.cookie("nanite-login").unwrap());
    assert_eq!(site.post("/login", "", &[("secret", token), ("csrf", page.csrf())]).status, 403, "no cookie");
    assert_eq!(site.post("/login", &cookie, &[("secret", token)]).status, 403, "no secret");
    assert_eq!(site.post("/login", &cookie, &[("secret", token), ("csrf", "x")]).status, 403, "a wrong secret");
    let answer = site.post("/login", &cookie, &[("secret", token), ("csrf", page.csrf())]);
    assert_eq!((answer.status, answer.header("location")), (303, "/"));
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_guessing_is_slowed_down() {
    let site = Site::new().await;
    let link = site.invitations.issue().unwrap();
    let tries: Vec<u16> = (0..6).map(|n| site.get(&format!("/login?token={n}"), "").status).collect();
    assert_eq!(tries, [403, 403, 403, 403, 403, 429]);
    let refused = site.get(&link, "");
    assert_eq!((refused.status, refused.cookie(&format!("nanite-{}", site.port))), (429, None), "the right one, too");
    let wait: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=11).contains(&wait), "{wait}");
    site.clock.advance(Duration::from_secs(wait));
    assert_eq!(site.get(&link, "").status, 303, "it was not used up");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_a_password_lets_in_and_no_link_does() {
    let site = Site::with(System::plain(), Some("correct horse"), false).await;
    let page = site.get("/login", "");
    assert!(page.body.contains("type=\"password\""), "{page:?}");
    let cookie = format!("Cookie: {}\r\n", page.cookie("nanite-login").unwrap());
    let login = |password: &str| site.post("/login", &cookie, &[("secret", password), ("csrf", page.csrf())]);
    let wrong = login("correct horsf");
    assert_eq!((wrong.status, wrong.body.contains("Wrong password.")), (403, true));
    assert!(!wrong.body.contains("horsf"), "what was tried is not shown again");
    assert_eq!(site.get("/login?token=correct+horse", "").status, 403);
    let good = login("correct horse");
    let cookie = format!("Cookie: {}\r\n", good.cookie("nanite-").unwrap());
    assert_eq!(site.get("/", &cookie).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_only_forms_of_the_session_do_something() {
    let site = Site::new().await;
    let ran = counter();
    let _agent = start(site.system.agent("fred").actor(work(&ran))).await;
    knows(&site.mapper, &["fred"]).await;
    let (mine, other) = (site.logged_in(), site.logged_in());
    let (csrf, others) = (site.get("/request", &mine), site.get("/request", &other));
    let (csrf, others) = (csrf.csrf(), others.csrf());
    assert_ne!(csrf, others);
    let send = |headers: &str, csrf: &str| {
        let form = [("service", "/work/echo"), ("timeout", "5"), ("csrf", csrf)];
        site.post("/request", &format!("{mine}{headers}"), &form)
    };
    let own = format!("Origin: http://127.0.0.1:{}\r\n", site.port);
    for (what, headers, secret) in [
        ("no secret", "", ""),
        ("a wrong one", "", "x"),
        ("that of another session", "", others),
        ("a page of another site", "Origin: https://evil.example\r\n", csrf),
        ("a page without an origin", "Origin: null\r\n", csrf),
        ("another port", "Origin: http://127.0.0.1:1\r\n", csrf),
        ("another site, says the browser", "Sec-Fetch-Site: cross-site\r\n", csrf),
        ("another program here, says the browser", "Sec-Fetch-Site: same-site\r\n", csrf),
        ("two origins", &format!("{own}Origin: https://evil.example\r\n"), csrf),
    ] {
        let refused = send(headers, secret);
        assert_eq!(refused.status, 403, "{what}: {refused:?}");
    }
    assert_eq!(ran.load(Ordering::SeqCst), 0, "nothing was sent");
    assert_eq!(site.post("/logout", &mine, &[]).status, 403);
    assert_eq!(site.get("/", &mine).status, 200, "still logged in");

    let sent = send(&format!("{own}Sec-Fetch-Site: same-origin\r\n"), csrf);
    assert_eq!(sent.status, 303);
    let place = sent.header("location").to_owned();
    crate::harness::wait_until("it ran", async || ran.load(Ordering::SeqCst) == 1).await;
    assert!(place.starts_with("/requests/"), "{place}");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_forms_and_heads_are_bounded() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let page = site.get("/request", &cookie);
    let form = |payload: &str| {
        let fields = [("service", "/none/here"), ("timeout", "5"), ("csrf", page.csrf()), ("payload", payload)];
        site.post("/request", &cookie, &fields).status
    };
    assert_eq!(form(&"x".repeat(1_000_000)), 303);
    assert_eq!(form(&"x".repeat(1 << 20)), 413);
    let head = format!(
        "POST /request HTTP/1.1\r\n{}{cookie}Content-Type: application/x-www-form-urlencoded\r\n\
         Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
        web::host(site.port)
    );
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(1 << 16));
    let chunked = format!("{head}{}0\r\n\r\n", chunk.repeat(17));
    assert_eq!(web::exchange(site.port, chunked.as_bytes()).status, 413, "without a length, too");

    let raw = |body: &str| {
        let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
        let length = body.len();
        let head = format!("POST /request HTTP/1.1\r\n{}{cookie}{kind}", web::host(site.port));
        let text = format!("{head}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}");
        web::exchange(site.port, text.as_bytes()).status
    };
    let csrf = page.csrf();
    assert_eq!(raw(&format!("csrf={csrf}&csrf={csrf}")), 400, "twice");
    assert_eq!(raw(&format!("csrf={csrf}&payload=%ff")), 400, "no UTF-8");
    assert_eq!(raw(&format!("csrf={csrf}{}", "&x=1".repeat(100))), 400);

    assert_eq!(site.get(&format!("/?q={}", "x".repeat(5000)), &cookie).status, 414);
    assert_eq!(site.get("/", &format!("{cookie}X: {}\r\n", "x".repeat(20_000))).status, 431);
    assert_eq!(site.get("/", &format!("{cookie}{}", "X: y\r\n".repeat(100))).status, 431);
    assert_eq!(site.get("/", &cookie).status, 200, "it lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_a_tower_that_only_shows_sends_nothing() {
    let site = Site::with(System::secure(), None, false).await;
    let ran = counter();
    let _agent = start(site.system.agent("fred").actor(work(&ran))).await;
    knows(&site.mapper, &["fred"]).await;
    let cookie = site.logged_in();
    let table = site.get("/", &cookie);
    assert!(table.body.contains("fred") && table.body.contains("read-only"), "{table:?}");
    assert!(!table.body.contains("\"/request\""), "it leads to no form");
    let form = site.get("/request", &cookie);
    assert!(form.body.contains("--allow-requests") && !form.body.contains("name=\"service\""), "{form:?}");
    let fields = [("service", "/work/echo"), ("timeout", "5"), ("csrf", table.csrf())];
    let refused = site.post("/request", &cookie, &fields);
    assert_eq!((refused.status, refused.body.contains("--allow-requests")), (403, true));
    assert_eq!(site.get("/requests", &cookie).body.matches("<li>").count(), 0);
    assert_eq!(ran.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_a_session_ends_by_logging_out_and_by_its_time() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let out = site.post("/logout", &cookie, &[("csrf", site.get("/", &cookie).csrf())]);
    assert_eq!((out.status, out.header("location")), (303, "/login"));
    assert_eq!(site.get("/", &cookie).status, 303);
    let cookie = site.logged_in();
    site.clock.advance(Duration::from_secs(12 * 3600 - 1));
    assert_eq!(site.get("/", &cookie).status, 200);
    site.clock.advance(Duration::from_secs(1));
    assert_eq!(site.get("/", &cookie).status, 303);
}

fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut text = String::new();
    let mut bytes = [0; 4096];
    while !text.contains(wanted) {
        let read = stream.read(&mut bytes).unwrap();
        assert!(read > 0, "it ended without {wanted:?}: {text}");
        text.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_events_are_for_a_session_and_bounded() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let (status, mut first) = events(site.port, "/events", &cookie);
    assert_eq!(status, 200);
    read_until(&mut first, "\"rows\":[]");
    let _agent = start(site.system.agent("fred").actor(work(&counter()))).await;
    read_until(&mut first, "/agents/fred");

    let more: Vec<_> = (0..31).map(|_| events(site.port, "/events", &cookie)).collect();
    assert!(more.iter().all(|(status, _)| *status == 200));
    assert_eq!(events(site.port, "/events", &cookie).0, 503, "there are enough");
    drop(more);
    // A place is free when it is noticed that a browser has gone.
    crate::harness::wait_until("a place is free", async || events(site.port, "/events", &cookie).0 == 200).await;

    assert_eq!(site.post("/logout", &cookie, &[("csrf", site.get("/", &cookie).csrf())]).status, 303);
    let mut rest = Vec::new();
    first.read_to_end(&mut rest).unwrap();
    assert_eq!(events(site.port, "/events", &cookie).0, 401, "it ended with its session");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_requests_under_way_are_bounded_and_can_be_stopped() {
    let site = Site::new().await;
    let _agent = start(site.system.agent("fred").actor(work(&counter())).concurrency(32)).await;
    knows(&site.mapper, &["fred"]).await;
    let cookie = site.logged_in();
    let csrf = site.get("/request", &cookie);
    let csrf = csrf.csrf();
    let fields = [("service", "/work/wait"), ("timeout", "3600"), ("csrf", csrf)];
    let send = || site.post("/request", &cookie, &fields);
    let places: Vec<String> = (0..16)
        .map(|_| {
            let sent = send();
            assert_eq!(sent.status, 303, "{sent:?}");
            sent.header("location").to_owned()
        })
        .collect();
    let refused = send();
    assert_eq!((refused.status, refused.body.contains("Too many requests are under way")), (503, true));
    let fred = nanite::packet::Identity::agent("fred").unwrap();
    let work = || site.mapper.workloads([&fred])[0];
    crate::harness::wait_until("all are under way", async || work().in_flight == 16).await;

    assert_eq!(site.post(&format!("{}/stop", places[0]), &cookie, &[]).status, 403, "no secret");
    assert_eq!(site.post(&format!("{}/stop", places[0]), &cookie, &[("csrf", csrf)]).status, 303);
    let stopped = async || site.get(&places[0], &cookie).body.contains("Stopped");
    crate::harness::wait_until("it is stopped", stopped).await;
    assert_eq!(work().in_flight, 15);
    assert_eq!(send().status, 303, "its place is free");
}

/// Clients that are slow on purpose. Time runs by itself here, as fast as nothing else happens.
#[tokio::test(start_paused = true)]
async fn n20_a_slow_client_is_not_waited_for() {
    let site = Site::new().await;
    let slow = async |text: String| {
        let port = site.port;
        // No time passes while a blocking task runs: what is sent has arrived before any of it does.
        let opened = tokio::task::spawn_blocking(move || web::open(port, text.as_bytes()));
        let mut stream = opened.await.unwrap();
        let (done, answer) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            let _ = stream.write_all(b"late");
            let _ = done.send(answer);
        });
        answer.await.unwrap()
    };
    let half_a_head = slow("GET / HTTP/1.1\r\nHost: ".into()).await;
    assert!(half_a_head.is_empty() || half_a_head.starts_with("HTTP/1.1 408"), "{half_a_head}");
    let head = format!(
        "POST /request HTTP/1.1\r\n{}Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 10\r\n\r\ncs",
        web::host(site.port)
    );
    let half_a_form = slow(head).await;
    assert!(half_a_form.starts_with("HTTP/1.1 408"), "{half_a_form}");
    let idle = slow(format!("GET /login HTTP/1.1\r\n{}\r\n", web::host(site.port))).await;
    assert!(idle.starts_with("HTTP/1.1 200"), "{idle}");
    assert!(idle.contains("</html>"), "it was answered, and the connection closed when nothing else came");
}
