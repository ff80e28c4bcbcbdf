//! Tests in a real browser: what users see and do.

use serde_json::json;

use super::{HOSTILE, Site, counter, work};
use crate::harness::browser::Browser;
use crate::harness::system::{System, start, wait_until_known};

/// The code of the Enter key (W3C WebDriver, section 17.4.2).
const ENTER: &str = "\u{e007}";

/// The names in the rows of the agent table.
fn names(browser: &Browser) -> Vec<String> {
    browser.texts("#rows th")
}

impl Site {
    /// A browser that is logged in.
    fn browser(&self) -> Browser {
        let browser = Browser::start();
        browser.open(&self.url(&self.invitations.issue().unwrap()));
        browser.wait_for_text("#agents-title", "Agents");
        browser
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_agent_table_updates_live() {
    let site = Site::new().await;
    let agent = async |name: &str, load: f64, tag: &str| {
        let agent = site.system.agent(name).status(move || load).tag(tag.parse().unwrap());
        start(agent.actor(work(&counter()))).await
    };
    let _fred = agent("fred", 0.25, "eu").await;
    let _bob = agent("bob", 3.5, "us").await;
    wait_until_known(&site.mapper, &["bob", "fred"]).await;
    let browser = site.browser();
    assert_eq!(browser.address(), site.url("/"), "the URL no longer has the token");
    browser.wait("both agents are listed", || names(&browser) == ["bob", "fred"]);
    let row = browser.text("#rows tr");
    for part in ["3.50", "/work/echo", "us"] {
        assert!(row.contains(part), "no {part} in {row:?}");
    }
    browser.element("#rows svg[aria-label^='load between']");

    // Set once, to show that the page is not reloaded from here on.
    browser.script("window.notReloaded = true");
    let anna = agent("anna", 1.0, "eu").await;
    browser.wait("a new agent appears", || names(&browser) == ["anna", "bob", "fred"]);
    browser.wait_for_text("#totals", "3");
    browser.wait_for_text("#events", "anna registered");

    browser.fill("#search", "eu");
    browser.wait("only matching agents are listed", || names(&browser) == ["anna", "fred"]);
    browser.wait_for_text("#summary", "2 of 3 agents");
    anna.stop().await.unwrap();
    browser.wait("a stopped agent disappears", || names(&browser) == ["fred"]);
    browser.wait_for_text("#events", "anna unregistered");
    browser.fill("#search", "unknown");
    browser.wait("no agent matches", || names(&browser).is_empty());
    browser.wait_for_text("#no-rows", "No agent matches.");
    assert_eq!(browser.script("return window.notReloaded"), json!(true));

    // A link for sorting keeps the search.
    browser.fill("#search", "work");
    browser.wait("both agents match", || names(&browser) == ["bob", "fred"]);
    browser.click("thead a[href*='sort=load']");
    browser.element("th[aria-sort='descending'] a[href*='sort=load']");
    browser.wait("sorted by load, highest first", || names(&browser) == ["bob", "fred"]);
    assert!(browser.address().contains("q=work"), "{}", browser.address());
    browser.click("thead a[href*='sort=load']");
    browser.element("th[aria-sort='ascending'] a[href*='sort=load']");
    browser.wait("sorted by load, lowest first", || names(&browser) == ["fred", "bob"]);

    browser.click("a[href='/agents/bob']");
    browser.wait_for_text("#details", "nanite-bob");
    let details = browser.text("#details");
    for part in ["online", "verified", "/work/steps", "us", "instance", "registered"] {
        assert!(details.contains(part), "no {part} in {details:?}");
    }
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_updated_row_keeps_keyboard_focus() {
    let site = Site::new().await;
    let _fred = start(site.system.agent("fred").actor(work(&counter()))).await;
    wait_until_known(&site.mapper, &["fred"]).await;
    let browser = site.browser();
    browser.wait("fred is listed", || names(&browser) == ["fred"]);
    browser.script("document.querySelector('#rows a').focus(); window.row = document.querySelector('#rows tr')");
    browser.wait("the row is replaced", || browser.script("return !window.row.isConnected") == json!(true));
    assert_eq!(browser.script("return document.activeElement.getAttribute('href')"), json!("/agents/fred"));
    browser.press(ENTER);
    browser.wait_for_text("#details", "nanite-fred");
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_request_page_shows_results_live() {
    let site = Site::new().await;
    let _agents = (
        start(site.system.agent("fred").actor(work(&counter()))).await,
        start(site.system.agent("bob").actor(work(&counter()))).await,
    );
    wait_until_known(&site.mapper, &["bob", "fred"]).await;
    let browser = site.browser();
    browser.click("nav a[href='/request']");
    browser.element("#services option[value='/work/steps']");
    browser.fill("#payload", "{\"a\":");
    browser.wait_for_text("#payload-hint", "Not valid JSON, so it is sent as text");
    browser.fill("#payload", "3");
    browser.wait_for_text("#payload-hint", "Valid JSON.");
    browser.fill("#service", "/work/steps");
    browser.click("#selector option[value='all']");
    browser.click(".request-form button");
    browser.wait_for_text("#progress", "2 answers, 0 failed, 6 intermediate results");
    let results = browser.texts("#results .result");
    assert_eq!(results.len(), 8);
    for name in ["bob", "fred"] {
        let results: Vec<_> = results.iter().filter(|result| result.starts_with(name)).collect();
        let kinds = ["step", "step", "step", "answer"];
        let in_order = results.iter().zip(kinds).all(|(result, kind)| result.contains(kind));
        assert!(results.len() == 4 && in_order, "{results:?}");
        assert!(results[3].ends_with("3 steps"), "{results:?}");
    }
    browser.click("nav a[href='/']");
    browser.wait_for_text("#totals", "2");
    browser.wait("no request failed", || browser.text("#rows td[data-label='Failures']") == "0");

    // A request that does not end: its page is shown at once, and is updated in all browsers.
    browser.click("nav a[href='/request']");
    browser.fill("#service", "/work/wait");
    browser.fill("#target", "fred");
    browser.fill("#timeout", "3600");
    browser.click(".request-form button");
    browser.wait_for_text("#progress", "Running");
    let other = site.browser();
    other.wait_for_text("#rows tr:nth-child(2) td[data-label='In flight']", "1");
    other.open(&browser.address());
    other.wait_for_text("#results + .empty", "Waiting for results.");
    other.script("window.notReloaded = true");
    browser.click("[data-running] button");
    browser.wait_for_text("#progress", "Stopped");
    other.wait_for_text("#progress", "Stopped");
    other.wait_for_text("#results + .empty", "No results.");
    assert_eq!(other.script("return window.notReloaded"), json!(true));
    drop(other);

    browser.click("nav a[href='/request']");
    browser.fill("#service", "/work/nothing");
    browser.click(".request-form button");
    browser.wait_for_text("#progress", "Failed");
    browser.wait_for_text("#progress", "no agent offers /work/nothing");
    browser.click("nav a[href='/request']");
    browser.fill("#service", "nothing");
    browser.fill("#target", "a b");
    browser.click(".request-form button");
    browser.wait_for_text("#service-error", "a service is /PREFIX/METHOD");
    browser.wait_for_text("#target-error", "a name is");
    browser.click("nav a[href='/requests']");
    browser.wait("three requests are listed", || browser.texts(".requests > li").len() == 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_hostile_input_is_escaped_on_every_page() {
    let site = Site::new().await;
    let agent = HOSTILE.iter().fold(site.system.agent("fred"), |agent, text| agent.tag(text.parse().unwrap()));
    let _agent = start(agent.actor(work(&counter()))).await;
    wait_until_known(&site.mapper, &["fred"]).await;
    let browser = site.browser();
    let harmless = |browser: &Browser, place: &str| {
        let found = browser.script(
            "return [window.ran === undefined, document.querySelectorAll('script').length, \
             document.querySelectorAll('img:not([src^=\"/assets/\"])').length, document.querySelectorAll('svg[onload]').length]",
        );
        assert_eq!(found, json!([true, 1, 0, 0]), "{place}");
        // The browser also reports the status of a rejected form.
        let complaints = browser.complaints().into_iter().filter(|message| !message.contains("status of 422"));
        assert_eq!(complaints.collect::<Vec<_>>(), Vec::<String>::new(), "{place}");
    };
    // The bidirectional mark is escaped, the rest is shown as it is.
    let shown = |text: &str| text.replace('\u{202e}', "\\u{202e}");
    let shows = |browser: &Browser, text: &str, place: &str| {
        let all = browser.script("return document.body.textContent");
        assert!(all.as_str().unwrap().contains(&shown(text)), "{place}: no {text:?} in {all}");
        assert!(!all.as_str().unwrap().contains('\u{202e}'), "{place}");
    };
    browser.wait("fred is listed", || names(&browser) == ["fred"]);
    HOSTILE.iter().take(3).for_each(|text| shows(&browser, text, "the table"));
    harmless(&browser, "the table");
    browser.click("a[href='/agents/fred']");
    browser.wait_for_text("#details", "nanite-fred");
    HOSTILE.iter().for_each(|text| shows(&browser, text, "an agent"));
    harmless(&browser, "an agent");

    for (which, text) in HOSTILE.iter().enumerate() {
        browser.open(&site.url("/request"));
        browser.fill("#service", "/work/hostile");
        browser.fill("#payload", &which.to_string());
        browser.fill("#tags", text);
        browser.click(".request-form button");
        browser.wait_for_text("#progress", "0 answers, 1 failed, 2 intermediate results");
        let results = browser.texts("#results .result");
        let collapse_spaces = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let expected = collapse_spaces(&shown(text));
        assert_eq!(collapse_spaces(&results[0]).matches(&expected).count(), 2, "key and value: {results:?}");
        assert_eq!(collapse_spaces(&results[2]).matches(&expected).count(), 2, "code and message: {results:?}");
        shows(&browser, text, "a request");
        harmless(&browser, "a request that is updated live");
        browser.open(&browser.address());
        browser.wait_for_text("#progress", "1 failed");
        harmless(&browser, "a request that is reloaded");

        // The payload is in the rejected form, and on the page of the request.
        browser.open(&site.url("/request"));
        browser.fill("#service", "no service");
        browser.fill("#payload", text);
        browser.fill("#target", text);
        browser.click(".request-form button");
        browser.wait_for_text("#service-error", "a service is");
        let value = |id: &str| browser.script(&format!("return document.getElementById('{id}').value"));
        assert_eq!((value("payload"), value("target")), (json!(text), json!(text)));
        harmless(&browser, "the form");
        browser.fill("#service", "/work/echo");
        browser.fill("#target", "fred");
        browser.click(".request-form button");
        browser.wait_for_text("#progress", "1 answer, 0 failed");
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

/// The second line of defence after escaping: the policy blocks scripts that reach a page.
#[tokio::test(flavor = "multi_thread")]
async fn n20_content_security_policy_blocks_injected_scripts() {
    let site = Site::new().await;
    let browser = site.browser();
    assert_eq!(browser.complaints(), Vec::<String>::new());
    let assert_blocked = |script: &str, expected: &str| {
        browser.script(script);
        let mut messages = Vec::new();
        browser.wait(&format!("{script} is blocked"), || {
            messages.extend(browser.complaints());
            messages.iter().any(|message| message.contains(expected))
        });
        assert_eq!(browser.script("return window.ran === undefined"), json!(true), "{script}");
    };
    let catching = |script: &str| format!("try {{ {script} }} catch {{}}");
    assert_blocked(
        &catching("trustedTypes.createPolicy('mine', {createHTML: (text) => text})"),
        "trusted-types nanite",
    );
    assert_blocked(
        &catching("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')"),
        "requires 'TrustedHTML'",
    );
    assert_blocked(
        &catching("document.createElement('script').textContent = 'window.ran = 1'"),
        "requires 'TrustedScript'",
    );
    assert_blocked(
        "const link = document.createElement('a'); link.href = 'javascript:window.ran = 1'; document.body.append(link); link.click()",
        "javascript",
    );
    assert_blocked(
        "const script = document.createElement('img'); script.src = 'http://127.0.0.1:1/x.png'; document.body.append(script)",
        "img-src 'self'",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn n20_pages_work_without_javascript() {
    let site = Site::with(System::plain(), Some("correct horse"), true).await;
    let _agent = start(site.system.agent("fred").actor(work(&counter()))).await;
    wait_until_known(&site.mapper, &["fred"]).await;
    let browser = Browser::start();
    browser.devtools("Emulation.setScriptExecutionDisabled", json!({"value": true}));
    browser.open(&site.url("/"));
    browser.fill("#secret", "correct horse");
    browser.click("button");
    browser.wait("fred is listed", || names(&browser) == ["fred"]);
    assert!(browser.text("noscript").contains("Reload"), "scripts are off: {}", browser.source());
    browser.fill("#search", "unknown");
    browser.click(".search button");
    browser.wait_for_text("#no-rows", "No agent matches.");
    browser.click("nav a[href='/request']");
    browser.fill("#service", "/work/steps");
    browser.fill("#payload", "2");
    browser.click(".request-form button");
    // The page reloads until the answers have arrived.
    browser.wait_for_text("#progress", "1 answer, 0 failed, 2 intermediate results");
    assert_eq!(browser.texts("#results .result").len(), 3);
    browser.click(".bar form button");
    browser.wait_for_text("label", "Password");
}
