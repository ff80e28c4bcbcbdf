//! Visitors behind a reverse proxy: the limit of login attempts is for each of them, not for the proxy.

use super::Site;
use crate::harness::program::Running;
use crate::harness::system::System;
use crate::harness::{site, web};

/// How many attempts a client may make at once.
const BURST: usize = 5;

async fn site_behind(proxies: &[&str]) -> Site {
    let proxies = proxies.iter().map(|proxy| proxy.parse().unwrap()).collect::<Vec<_>>();
    Site::configured(System::plain(), None, |tower| tower.trusted_proxies(proxies)).await
}

/// What a proxy sends for a visitor: the header of the visitor, with the visitor's address at its end.
fn through_proxy(visitor: &str, sent: &str) -> String {
    if sent.is_empty() {
        format!("X-Forwarded-For: {visitor}\r\n")
    } else {
        format!("X-Forwarded-For: {sent}, {visitor}\r\n")
    }
}

/// Tries to log in with a wrong token; returns the status.
fn attempt(port: u16, headers: &str) -> u16 {
    web::get(port, "/login?token=x", headers).status
}

fn use_up_attempts(port: u16, headers: &str) {
    for _ in 0..BURST {
        assert_eq!(attempt(port, headers), 403);
    }
    assert_eq!(attempt(port, headers), 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_forwarded_address_is_ignored_without_a_trusted_proxy() {
    for proxies in [&[][..], &["192.0.2.0/24", "::1"]] {
        let site = site_behind(proxies).await;
        for n in 0..BURST {
            assert_eq!(attempt(site.port, &through_proxy(&format!("198.51.100.{n}"), "")), 403);
        }
        assert_eq!(attempt(site.port, &through_proxy("198.51.100.99", "")), 429, "{proxies:?}");
        assert_eq!(attempt(site.port, ""), 429, "{proxies:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_visitors_behind_a_trusted_proxy_are_limited_separately() {
    let site = site_behind(&["127.0.0.1", "10.0.0.0/8"]).await;
    let (eve, bob) = (through_proxy("198.51.100.7", ""), through_proxy("203.0.113.9", ""));
    use_up_attempts(site.port, &eve);
    assert_eq!(attempt(site.port, &bob), 403, "another visitor has attempts of its own");
    let link = site.invitations.issue().unwrap();
    assert_eq!(site.get(&link, &eve).status, 429);
    assert_eq!(site.get(&link, &bob).status, 303, "and can log in");
    // Through two proxies.
    assert_eq!(attempt(site.port, &through_proxy("10.1.2.3", "198.51.100.7")), 429);
    assert_eq!(attempt(site.port, &through_proxy("10.1.2.3", "198.51.100.8")), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_visitor_cannot_forge_its_address_through_a_trusted_proxy() {
    let site = site_behind(&["127.0.0.1"]).await;
    use_up_attempts(site.port, &through_proxy("198.51.100.7", ""));
    for forged in ["203.0.113.1", "127.0.0.1", "203.0.113.2, 127.0.0.1", "unknown", "", ","] {
        assert_eq!(attempt(site.port, &through_proxy("198.51.100.7", forged)), 429, "{forged:?}");
    }
    // A line of the visitor's own, before the line of the proxy.
    let two = format!("X-Forwarded-For: 203.0.113.3\r\n{}", through_proxy("198.51.100.7", ""));
    assert_eq!(attempt(site.port, &two), 429);
    // Nor can it lock out another: what it sends is not believed.
    for _ in 0..=BURST {
        attempt(site.port, &through_proxy("198.51.100.7", "203.0.113.50"));
    }
    assert_eq!(attempt(site.port, &through_proxy("203.0.113.50", "")), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_ipv6_visitors_behind_a_trusted_proxy_are_limited_by_network() {
    let site = site_behind(&["127.0.0.1", "fd00::/8"]).await;
    use_up_attempts(site.port, &through_proxy("2001:db8:0:1::1", ""));
    assert_eq!(attempt(site.port, &through_proxy("2001:db8:0:1::2", "")), 429, "the same network");
    assert_eq!(attempt(site.port, &through_proxy("[2001:db8:0:1::3]:4711", "")), 429);
    assert_eq!(attempt(site.port, &through_proxy("2001:db8:0:2::1", "")), 403, "another network");
    assert_eq!(attempt(site.port, &through_proxy("fd00::9", "2001:db8:0:1::1")), 429);
}

#[test]
fn n20_program_trusts_the_proxies_that_it_is_given() {
    let site = site::Site::new(&["mapper tower"]);
    let hash = site.run_with_input(&["admin", "hash-password"], b"correct horse\n");
    site.write("tower.hash", &hash.out, 0o600);
    let options = ["admin", "--token", "tower", "--listen", "127.0.0.1:0", "--password-hash-file", "tower.hash"];
    let bad = site.run(&[&options[..], &["--trusted-proxy", "10.0.0.1/8"]].concat());
    assert_eq!(bad.code(), 2, "{bad:?}");
    assert!(bad.err.contains("a trusted proxy is an address or a network"), "{bad:?}");

    let start = |more: &[&str]| -> Running {
        let mut tower = site.start(&[&options[..], more].concat());
        tower.wait_for("log in with the password");
        tower
    };
    let login = |port: u16, visitor: &str| {
        let page = web::get(port, "/login", "");
        let headers = format!("Cookie: {}\r\n{}", page.cookie("nanite-login").unwrap(), through_proxy(visitor, ""));
        web::post(port, "/login", &headers, &[("secret", "wrong"), ("csrf", page.csrf())]).status
    };
    let tower = start(&["--trusted-proxy", "192.0.2.1", "--trusted-proxy", "127.0.0.0/8"]);
    let port = super::program::port(&tower);
    let statuses: Vec<u16> = (0..=BURST).map(|_| login(port, "198.51.100.7")).collect();
    assert_eq!(statuses, [403, 403, 403, 403, 403, 429]);
    assert_eq!(login(port, "203.0.113.9"), 403);
}
