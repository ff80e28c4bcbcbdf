//! Tests of the HTTP interface, byte by byte: rejected requests, limits, and the headers of every response.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Site, counter, work};
use crate::harness::system::{System, start, wait_until_known};
use crate::harness::web::{self, Answer, events};

fn assert_security_headers(what: &str, answer: &Answer) {
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
async fn n20_all_responses_have_security_headers() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let raw = |text: &str| web::exchange(site.port, text.replace("HOST", &web::host(site.port)).as_bytes());
    for (what, status, answer) in [
        ("the table", 200, site.get("/", &cookie)),
        ("the form", 200, site.get("/request", &cookie)),
        ("the table without a session", 303, site.get("/", "")),
        ("events without a session", 401, site.get("/events", "Accept: text/event-stream\r\n")),
        ("the login page", 200, site.get("/login", "")),
        ("a wrong token", 403, site.get("/login?token=x", "")),
        ("the style sheet", 200, site.get("/assets/tower.css", "")),
        ("an unknown page", 404, site.get("/x", &cookie)),
        ("an unknown agent", 404, site.get("/agents/x", &cookie)),
        ("an unknown asset", 404, site.get("/assets/..%2ftower.rs", "")),
        ("a form without a CSRF token", 403, site.post("/request", &cookie, &[])),
        ("an unsupported method", 405, raw("DELETE / HTTP/1.1\r\nHOSTConnection: close\r\n\r\n")),
        ("an unsupported method of a page", 405, site.post("/", &cookie, &[])),
        ("no Host header", 421, raw("GET / HTTP/1.0\r\n\r\n")),
        (
            "no form content type",
            415,
            raw("POST /login HTTP/1.1\r\nHOSTContent-Length: 2\r\nConnection: close\r\n\r\n{}"),
        ),
    ] {
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert_security_headers(what, &answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_rejects_foreign_host_header() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let status =
        |head: &str| web::exchange(site.port, format!("{head}\r\n{cookie}Connection: close\r\n\r\n").as_bytes()).status;
    let port = site.port;
    assert_eq!(status(&format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}")), 200);
    assert_eq!(status(&format!("GET / HTTP/1.1\r\nHost: LocalHost:{port}")), 200);
    for foreign in [
        format!("evil.example:{port}"),
        "evil.example".to_owned(),
        "127.0.0.1".to_owned(),
        format!("127.0.0.1:{}", port ^ 1),
        format!("127.0.0.1.evil.example:{port}"),
        format!("localhost:{port}, evil.example"),
        String::new(),
    ] {
        assert_eq!(status(&format!("GET / HTTP/1.1\r\nHost: {foreign}")), 421, "{foreign:?}");
    }
    let two = format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example");
    assert_eq!(status(&two), 421);
    let absolute = format!("GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1:{port}");
    assert_eq!(status(&absolute), 421);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_all_pages_and_actions_require_login() {
    let site = Site::new().await;
    let ran = counter();
    let _agent = start(site.system.agent("fred").actor(work(&ran))).await;
    wait_until_known(&site.mapper, &["fred"]).await;
    let paths = ["/", "/events", "/agents/fred", "/agents/fred/events", "/request", "/requests", "/requests/x/events"];
    for cookie in ["", "Cookie: nanite=x\r\n", &format!("Cookie: nanite-{}={}\r\n", site.port, "0".repeat(64))] {
        for path in paths {
            let page = site.get(path, cookie);
            assert_eq!((page.status, page.header("location")), (303, "/login"), "{path}");
            assert!(!page.body.contains("fred"), "{path}: {page:?}");
            let events = site.get(path, &format!("{cookie}Accept: text/event-stream\r\n"));
            assert_eq!(events.status, 401, "{path}: an event stream is not redirected");
        }
        for path in ["/request", "/requests/x/stop", "/logout"] {
            let form = [("service", "/work/echo"), ("timeout", "5"), ("csrf", "x")];
            assert_eq!(site.post(path, cookie, &form).status, 401, "{path}");
        }
    }
    assert_eq!(ran.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_invitation_link_works_once() {
    let site = Site::new().await;
    let link = site.invitations.issue().unwrap();
    let answer = site.get(&link, "");
    let cookie = &answer.headers.iter().find(|(name, _)| name == "set-cookie").unwrap().1;
    for part in ["; HttpOnly", "; SameSite=Strict", "; Path=/"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!link.contains(cookie.split(['=', ';']).nth(1).unwrap()), "the cookie differs from the token");
    assert_eq!(site.get(&link, "").status, 403, "already used");

    // With the form of the login page, which has its own CSRF token.
    let link = site.invitations.issue().unwrap();
    let token = link.split_once('=').unwrap().1;
    let page = site.get("/login", "");
    let cookie = format!("Cookie: {}\r\n", page.cookie("nanite-login").unwrap());
    assert_eq!(site.post("/login", "", &[("secret", token), ("csrf", page.csrf())]).status, 403, "no cookie");
    assert_eq!(site.post("/login", &cookie, &[("secret", token)]).status, 403, "no CSRF token");
    assert_eq!(site.post("/login", &cookie, &[("secret", token), ("csrf", "x")]).status, 403, "wrong CSRF token");
    let answer = site.post("/login", &cookie, &[("secret", token), ("csrf", page.csrf())]);
    assert_eq!((answer.status, answer.header("location")), (303, "/"));
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_login_attempts_are_rate_limited() {
    let site = Site::new().await;
    let link = site.invitations.issue().unwrap();
    let statuses: Vec<u16> = (0..6).map(|n| site.get(&format!("/login?token={n}"), "").status).collect();
    assert_eq!(statuses, [403, 403, 403, 403, 403, 429]);
    let refused = site.get(&link, "");
    assert_eq!((refused.status, refused.cookie(&format!("nanite-{}", site.port))), (429, None), "a valid token too");
    let wait: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=11).contains(&wait), "{wait}");
    site.clock.advance(Duration::from_secs(wait));
    assert_eq!(site.get(&link, "").status, 303, "the token was not used up");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_password_login_works_by_form_only() {
    let site = Site::with(System::plain(), Some("correct horse"), false).await;
    let page = site.get("/login", "");
    assert!(page.body.contains("type=\"password\""), "{page:?}");
    let cookie = format!("Cookie: {}\r\n", page.cookie("nanite-login").unwrap());
    let login = |password: &str| site.post("/login", &cookie, &[("secret", password), ("csrf", page.csrf())]);
    let wrong = login("correct horsf");
    assert_eq!((wrong.status, wrong.body.contains("Wrong password.")), (403, true));
    assert!(!wrong.body.contains("horsf"), "the page does not show the attempted password");
    assert_eq!(site.get("/login?token=correct+horse", "").status, 403);
    let good = login("correct horse");
    let cookie = format!("Cookie: {}\r\n", good.cookie("nanite-").unwrap());
    assert_eq!(site.get("/", &cookie).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_rejects_forms_without_valid_csrf_token_or_origin() {
    let site = Site::new().await;
    let ran = counter();
    let _agent = start(site.system.agent("fred").actor(work(&ran))).await;
    wait_until_known(&site.mapper, &["fred"]).await;
    let (mine, other) = (site.logged_in(), site.logged_in());
    let (csrf, others) = (site.get("/request", &mine), site.get("/request", &other));
    let (csrf, others) = (csrf.csrf(), others.csrf());
    assert_ne!(csrf, others);
    let send = |headers: &str, csrf: &str| {
        let form = [("service", "/work/echo"), ("timeout", "5"), ("csrf", csrf)];
        site.post("/request", &format!("{mine}{headers}"), &form)
    };
    let own_origin = format!("Origin: http://127.0.0.1:{}\r\n", site.port);
    for (what, headers, token) in [
        ("no token", "", ""),
        ("wrong token", "", "x"),
        ("token of another session", "", others),
        ("origin of another site", "Origin: https://evil.example\r\n", csrf),
        ("opaque origin", "Origin: null\r\n", csrf),
        ("origin with another port", "Origin: http://127.0.0.1:1\r\n", csrf),
        ("cross-site request", "Sec-Fetch-Site: cross-site\r\n", csrf),
        ("same-site request from another origin", "Sec-Fetch-Site: same-site\r\n", csrf),
        ("two origins", &format!("{own_origin}Origin: https://evil.example\r\n"), csrf),
    ] {
        let refused = send(headers, token);
        assert_eq!(refused.status, 403, "{what}: {refused:?}");
    }
    assert_eq!(ran.load(Ordering::SeqCst), 0, "no request was sent");
    assert_eq!(site.post("/logout", &mine, &[]).status, 403);
    assert_eq!(site.get("/", &mine).status, 200, "still logged in");

    let sent = send(&format!("{own_origin}Sec-Fetch-Site: same-origin\r\n"), csrf);
    assert_eq!(sent.status, 303);
    let location = sent.header("location").to_owned();
    crate::harness::wait_until("the request ran", async || ran.load(Ordering::SeqCst) == 1).await;
    assert!(location.starts_with("/requests/"), "{location}");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_form_and_header_sizes_are_limited() {
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
    assert_eq!(web::exchange(site.port, chunked.as_bytes()).status, 413, "also without Content-Length");

    let raw = |body: &str| {
        let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
        let length = body.len();
        let head = format!("POST /request HTTP/1.1\r\n{}{cookie}{kind}", web::host(site.port));
        let text = format!("{head}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}");
        web::exchange(site.port, text.as_bytes()).status
    };
    let csrf = page.csrf();
    assert_eq!(raw(&format!("csrf={csrf}&csrf={csrf}")), 400, "repeated field");
    assert_eq!(raw(&format!("csrf={csrf}&payload=%ff")), 400, "invalid UTF-8");
    assert_eq!(raw(&format!("csrf={csrf}{}", "&x=1".repeat(100))), 400);

    assert_eq!(site.get(&format!("/?q={}", "x".repeat(5000)), &cookie).status, 414);
    assert_eq!(site.get("/", &format!("{cookie}X: {}\r\n", "x".repeat(20_000))).status, 431);
    assert_eq!(site.get("/", &format!("{cookie}{}", "X: y\r\n".repeat(100))).status, 431);
    assert_eq!(site.get("/", &cookie).status, 200, "the server still works");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_read_only_tower_sends_no_requests() {
    let site = Site::with(System::secure(), None, false).await;
    let ran = counter();
    let _agent = start(site.system.agent("fred").actor(work(&ran))).await;
    wait_until_known(&site.mapper, &["fred"]).await;
    let cookie = site.logged_in();
    let table = site.get("/", &cookie);
    assert!(table.body.contains("fred") && table.body.contains("read-only"), "{table:?}");
    assert!(!table.body.contains("\"/request\""), "no link to the form");
    let form = site.get("/request", &cookie);
    assert!(form.body.contains("--allow-requests") && !form.body.contains("name=\"service\""), "{form:?}");
    let fields = [("service", "/work/echo"), ("timeout", "5"), ("csrf", table.csrf())];
    let refused = site.post("/request", &cookie, &fields);
    assert_eq!((refused.status, refused.body.contains("--allow-requests")), (403, true));
    assert_eq!(site.get("/requests", &cookie).body.matches("<li>").count(), 0);
    assert_eq!(ran.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_session_ends_at_logout_and_expiry() {
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
        assert!(read > 0, "the stream ended without {wanted:?}: {text}");
        text.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_event_streams_require_session_and_are_limited() {
    let site = Site::new().await;
    let cookie = site.logged_in();
    let (status, mut first) = events(site.port, "/events", &cookie);
    assert_eq!(status, 200);
    read_until(&mut first, "\"rows\":[]");
    let _agent = start(site.system.agent("fred").actor(work(&counter()))).await;
    read_until(&mut first, "/agents/fred");

    let more: Vec<_> = (0..31).map(|_| events(site.port, "/events", &cookie)).collect();
    assert!(more.iter().all(|(status, _)| *status == 200));
    assert_eq!(events(site.port, "/events", &cookie).0, 503, "the limit is reached");
    drop(more);
    // A slot is free again as soon as the server notices that a browser has gone: when it sends the next change.
    crate::harness::wait_until("a slot is free", async || {
        start(site.system.agent("bob").actor(work(&counter()))).await.stop().await.unwrap();
        events(site.port, "/events", &cookie).0 == 200
    })
    .await;

    assert_eq!(site.post("/logout", &cookie, &[("csrf", site.get("/", &cookie).csrf())]).status, 303);
    let mut rest = Vec::new();
    first.read_to_end(&mut rest).unwrap();
    assert_eq!(events(site.port, "/events", &cookie).0, 401, "the stream ended with its session");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_running_requests_are_limited_and_can_be_stopped() {
    let site = Site::new().await;
    let _agent = start(site.system.agent("fred").actor(work(&counter())).concurrency(32)).await;
    wait_until_known(&site.mapper, &["fred"]).await;
    let cookie = site.logged_in();
    let csrf = site.get("/request", &cookie);
    let csrf = csrf.csrf();
    let fields = [("service", "/work/wait"), ("timeout", "3600"), ("csrf", csrf)];
    let send = || site.post("/request", &cookie, &fields);
    let locations: Vec<String> = (0..16)
        .map(|_| {
            let sent = send();
            assert_eq!(sent.status, 303, "{sent:?}");
            sent.header("location").to_owned()
        })
        .collect();
    let refused = send();
    assert_eq!((refused.status, refused.body.contains("Too many requests are in progress")), (503, true));
    let fred = nanite::packet::Identity::agent("fred").unwrap();
    let work = || site.mapper.workloads([&fred])[0];
    crate::harness::wait_until("all requests are running", async || work().in_flight == 16).await;

    assert_eq!(site.post(&format!("{}/stop", locations[0]), &cookie, &[]).status, 403, "no CSRF token");
    assert_eq!(site.post(&format!("{}/stop", locations[0]), &cookie, &[("csrf", csrf)]).status, 303);
    let stopped = async || site.get(&locations[0], &cookie).body.contains("Stopped");
    crate::harness::wait_until("the request is stopped", stopped).await;
    assert_eq!(work().in_flight, 15);
    assert_eq!(send().status, 303, "its slot is free");
}

/// Clients that send and read nothing more. The clock is paused: it jumps to the next timer when everything is idle.
#[tokio::test(start_paused = true)]
async fn n20_slow_clients_time_out() {
    let site = Site::new().await;
    let slow = async |text: String| {
        let port = site.port;
        // The clock does not advance while a blocking task runs, so the bytes arrive before any timeout.
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
    assert!(idle.contains("</html>"), "answered, and the idle connection was closed");
}
