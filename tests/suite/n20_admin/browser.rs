//! What a person sees and does, in a real browser.

use serde_json::json;

use super::{HOSTILE, Site, counter, work};
use crate::harness::browser::Browser;
use crate::harness::system::{System, knows, start};

/// The key Enter (W3C WebDriver, section 17.4.2).
const ENTER: &str = "\u{e007}";

/// The address of a page, as a list of the names that its rows have.
fn names(browser: &Browser) -> Vec<String> {
    browser.texts("#rows th")
}

impl Site {
    /// A browser that was let in.
    fn browser(&self) -> Browser {
        let browser = Browser::start();
        browser.open(&self.url(&self.invitations.issue().unwrap()));
        browser.wait_for_text("#agents-title", "Agents");
        browser
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_the_table_follows_the_agents() {
    let site = Site::new().await;
    let agent = async |name: &str, load: f64, tag: &str| {
        let agent = site.system.agent(name).status(move || load).tag(tag.parse().unwrap());
        start(agent.actor(work(&counter()))).await
    };
    let _fred = agent("fred", 0.25, "eu").await;
    let _bob = agent("bob", 3.5, "us").await;
    knows(&site.mapper, &["bob", "fred"]).await;
    let browser = site.browser();
    assert_eq!(browser.address(), site.url("/"), "the token is gone from the address");
    browser.wait("both are there", || names(&browser) == ["bob", "fred"]);
    let row = browser.text("#rows tr");
    for part in ["3.50", "/work/echo", "us"] {
        assert!(row.contains(part), "no {part} in {row:?}");
    }
    browser.element("#rows svg[aria-label^='load between']");

    // Nobody loads the page again from here on.
    browser.script("window.same = true");
    let anna = agent("anna", 1.0, "eu").await;
    browser.wait("a new one shows up", || names(&browser) == ["anna", "bob", "fred"]);
    browser.wait_for_text("#tiles", "3");
    browser.wait_for_text("#recent", "anna came");

    browser.fill("#search", "eu");
    browser.wait("only those that fit", || names(&browser) == ["anna", "fred"]);
    browser.wait_for_text("#summary", "2 of 3 agents");
    anna.stop().await.unwrap();
    browser.wait("one goes", || names(&browser) == ["fred"]);
    browser.wait_for_text("#recent", "anna left");
    browser.fill("#search", "nobody");
    browser.wait("none fits", || names(&browser).is_empty());
    browser.wait_for_text("#none", "No agent fits.");
    assert_eq!(browser.script("return window.same"), json!(true));

    // Sorting leads to another page, which knows what was searched for.
    browser.fill("#search", "work");
    browser.wait("both fit", || names(&browser) == ["bob", "fred"]);
    browser.click("thead a[href*='sort=load']");
    browser.element("th[aria-sort='descending'] a[href*='sort=load']");
    browser.wait("the most loaded first", || names(&browser) == ["bob", "fred"]);
    assert!(browser.address().contains("q=work"), "{}", browser.address());
    browser.click("thead a[href*='sort=load']");
    browser.element("th[aria-sort='ascending'] a[href*='sort=load']");
    browser.wait("the least loaded first", || names(&browser) == ["fred", "bob"]);

    browser.click("a[href='/agents/bob']");
    browser.wait_for_text("#facts", "nanite-bob");
    let facts = browser.text("#facts");
    for part in ["its signature", "/work/steps", "us", "instance", "came"] {
        assert!(facts.contains(part), "no {part} in {facts:?}");
    }
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_a_row_keeps_the_focus_while_it_changes() {
    let site = Site::new().await;
    let _fred = start(site.system.agent("fred").actor(work(&counter()))).await;
    knows(&site.mapper, &["fred"]).await;
    let browser = site.browser();
    browser.wait("fred is there", || names(&browser) == ["fred"]);
    browser.script("document.querySelector('#rows a').focus(); window.row = document.querySelector('#rows tr')");
    browser.wait("the row was made anew", || browser.script("return !window.row.isConnected") == json!(true));
    assert_eq!(browser.script("return document.activeElement.getAttribute('href')"), json!("/agents/fred"));
    browser.press(ENTER);
    browser.wait_for_text("#facts", "nanite-fred");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_a_request_shows_its_answers_as_they_come() {
    let site = Site::new().await;
    let _agents = (
        start(site.system.agent("fred").actor(work(&counter()))).await,
        start(site.system.agent("bob").actor(work(&counter()))).await,
    );
    knows(&site.mapper, &["bob", "fred"]).await;
    let browser = site.browser();
    browser.click("nav a[href='/request']");
    browser.element("#services option[value='/work/steps']");
    browser.fill("#payload", "{\"a\":");
    browser.wait_for_text("#payload-is", "Not JSON, so it is sent as text");
    browser.fill("#payload", "3");
    browser.wait_for_text("#payload-is", "This is JSON.");
    browser.fill("#service", "/work/steps");
    browser.click("#selector option[value='all']");
    browser.click(".ask button");
    browser.wait_for_text("#tally", "2 answers, 0 failed, 6 intermediate results");
    let entries = browser.texts("#entries .entry");
    assert_eq!(entries.len(), 8);
    for name in ["bob", "fred"] {
        let of: Vec<_> = entries.iter().filter(|entry| entry.starts_with(name)).collect();
        let parts = ["step", "step", "step", "answer"];
        assert!(of.len() == 4 && of.iter().zip(parts).all(|(entry, part)| entry.contains(part)), "in order: {of:?}");
        assert!(of[3].ends_with("3 steps"), "{of:?}");
    }
    browser.click("nav a[href='/']");
    browser.wait_for_text("#tiles", "2");
    browser.wait("none failed", || browser.text("#rows td[data-label='Failures']") == "0");

    // One that does not end: the page is there at once, and what comes is put into it.
    browser.click("nav a[href='/request']");
    browser.fill("#service", "/work/wait");
    browser.fill("#target", "fred");
    browser.fill("#timeout", "3600");
    browser.click(".ask button");
    browser.wait_for_text("#tally", "Running");
    browser.script("window.same = true");
    let other = site.browser();
    other.wait_for_text("#rows tr:nth-child(2) td[data-label='In flight']", "1");
    drop(other);
    browser.click("[data-running] button");
    browser.wait_for_text("#tally", "Stopped");

    browser.click("nav a[href='/request']");
    browser.fill("#service", "/work/nothing");
    browser.click(".ask button");
    browser.wait_for_text("#tally", "Not sent");
    browser.wait_for_text("#tally", "no agent offers /work/nothing");
    browser.click("nav a[href='/request']");
    browser.fill("#service", "nothing");
    browser.fill("#target", "a b");
    browser.click(".ask button");
    browser.wait_for_text("#service-wrong", "a service is /PREFIX/METHOD");
    browser.wait_for_text("#target-wrong", "a name is");
    browser.click("nav a[href='/requests']");
    browser.wait("three were sent", || browser.texts(".runs > li").len() == 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_what_strangers_write_is_shown_as_text_and_runs_nothing() {
    let site = Site::new().await;
    let agent = HOSTILE.iter().fold(site.system.agent("fred"), |agent, text| agent.tag(text.parse().unwrap()));
    let _agent = start(agent.actor(work(&counter()))).await;
    knows(&site.mapper, &["fred"]).await;
    let browser = site.browser();
    let harmless = |browser: &Browser, place: &str| {
        let found = browser.script(
            "return [window.ran === undefined, document.querySelectorAll('script').length, \
             document.querySelectorAll('img:not([src^=\"/assets/\"])').length, document.querySelectorAll('svg[onload]').length]",
        );
        assert_eq!(found, json!([true, 1, 0, 0]), "{place}");
        // That a form is sent back for mending is a complaint, too.
        let complaints = browser.complaints().into_iter().filter(|said| !said.contains("status of 422"));
        assert_eq!(complaints.collect::<Vec<_>>(), Vec::<String>::new(), "{place}");
    };
    // The reordering mark is made visible, the rest is as it was written.
    let shown = |text: &str| text.replace('\u{202e}', "\\u{202e}");
    let shows = |browser: &Browser, text: &str, place: &str| {
        let all = browser.script("return document.body.textContent");
        assert!(all.as_str().unwrap().contains(&shown(text)), "{place}: no {text:?} in {all}");
        assert!(!all.as_str().unwrap().contains('\u{202e}'), "{place}");
    };
    browser.wait("fred is there", || names(&browser) == ["fred"]);
    HOSTILE.iter().take(3).for_each(|text| shows(&browser, text, "the table"));
    harmless(&browser, "the table");
    browser.click("a[href='/agents/fred']");
    browser.wait_for_text("#facts", "nanite-fred");
    HOSTILE.iter().for_each(|text| shows(&browser, text, "an agent"));
    harmless(&browser, "an agent");

    for (which, text) in HOSTILE.iter().enumerate() {
        browser.open(&site.url("/request"));
        browser.fill("#service", "/work/hostile");
        browser.fill("#payload", &which.to_string());
        browser.fill("#tags", text);
        browser.click(".ask button");
        browser.wait_for_text("#tally", "0 answers, 1 failed, 2 intermediate results");
        let entries = browser.texts("#entries .entry");
        let first = shown(text).split_whitespace().collect::<Vec<_>>().join(" ");
        let in_words = |entry: &str| entry.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(in_words(&entries[0]).matches(&first).count(), 2, "key and value: {entries:?}");
        assert_eq!(in_words(&entries[2]).matches(&first).count(), 2, "code and message: {entries:?}");
        shows(&browser, text, "a request");
        harmless(&browser, "a request that is shown live");
        browser.open(&browser.address());
        browser.wait_for_text("#tally", "1 failed");
        harmless(&browser, "a request that is loaded again");

        // The payload comes back in the form when something is wrong with it, and in the page of the request.
        browser.open(&site.url("/request"));
        browser.fill("#service", "no service");
        browser.fill("#payload", text);
        browser.fill("#target", text);
        browser.click(".ask button");
        browser.wait_for_text("#service-wrong", "a service is");
        let value = |id: &str| browser.script(&format!("return document.getElementById('{id}').value"));
        assert_eq!((value("payload"), value("target")), (json!(text), json!(text)));
        harmless(&browser, "the form");
        browser.fill("#service", "/work/echo");
        browser.fill("#target", "fred");
        browser.click(".ask button");
        browser.wait_for_text("#tally", "1 answer, 0 failed");
        shows(&browser, text, "an answer");
        harmless(&browser, "an answer");

        let search = crate::harness::web::encoded(text);
        browser.open(&site.url(&format!("/?q={search}")));
        assert_eq!(browser.script("return document.getElementById('search').value"), json!(text.trim()));
        harmless(&browser, "a search");
    }
    browser.open(&site.url("/requests"));
    harmless(&browser, "all requests");
}

/// The counterpart of the test before: were something not escaped, the policy would still not let it run.
#[tokio::test(flavor = "multi_thread")]
async fn n20_the_policy_lets_nothing_else_run() {
    let site = Site::new().await;
    let browser = site.browser();
    assert_eq!(browser.complaints(), Vec::<String>::new());
    let stopped = |script: &str, complaint: &str| {
        browser.script(script);
        let mut said = Vec::new();
        browser.wait(&format!("{script} is stopped"), || {
            said.extend(browser.complaints());
            said.iter().any(|said| said.contains(complaint))
        });
        assert_eq!(browser.script("return window.ran === undefined"), json!(true), "{script}");
    };
    let quietly = |script: &str| format!("try {{ {script} }} catch {{}}");
    stopped(&quietly("trustedTypes.createPolicy('mine', {createHTML: (text) => text})"), "trusted-types nanite");
    stopped(
        &quietly("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')"),
        "requires 'TrustedHTML'",
    );
    stopped(&quietly("document.createElement('script').textContent = 'window.ran = 1'"), "requires 'TrustedScript'");
    stopped(
        "const link = document.createElement('a'); link.href = 'javascript:window.ran = 1'; document.body.append(link); link.click()",
        "javascript",
    );
    stopped(
        "const script = document.createElement('img'); script.src = 'http://127.0.0.1:1/x.png'; document.body.append(script)",
        "img-src 'self'",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_everything_works_without_scripts() {
    let site = Site::with(System::plain(), Some("correct horse"), true).await;
    let _agent = start(site.system.agent("fred").actor(work(&counter()))).await;
    knows(&site.mapper, &["fred"]).await;
    let browser = Browser::start();
    browser.devtools("Emulation.setScriptExecutionDisabled", json!({"value": true}));
    browser.open(&site.url("/"));
    browser.fill("#secret", "correct horse");
    browser.click("button");
    browser.wait("fred is there", || names(&browser) == ["fred"]);
    assert!(browser.text("noscript").contains("Reload"), "scripts are off: {}", browser.source());
    browser.fill("#search", "nobody");
    browser.click(".search button");
    browser.wait_for_text("#none", "No agent fits.");
    browser.click("nav a[href='/request']");
    browser.fill("#service", "/work/steps");
    browser.fill("#payload", "2");
    browser.click(".ask button");
    // It may have been shown before the answers were there: then it loads itself again.
    browser.wait_for_text("#tally", "1 answer, 0 failed, 2 intermediate results");
    assert_eq!(browser.texts("#entries .entry").len(), 3);
    browser.click(".bar form button");
    browser.wait_for_text("label", "Password");
}
