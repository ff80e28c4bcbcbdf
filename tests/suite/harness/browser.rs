//! A real browser: headless Chromium, controlled through ChromeDriver (W3C WebDriver, HTTP with JSON).

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{WAIT_TIMEOUT, web};

/// The JSON key of an element's id (W3C WebDriver, section 12).
const ELEMENT_KEY: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one page; it is closed when this is dropped.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: tempfile::TempDir,
}

/// An element of the page.
#[derive(Clone, Debug)]
pub struct Element(String);

impl Browser {
    pub fn start() -> Self {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver is there: scripts/deps.sh test installs it");
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines().map_while(Result::ok);
        let ready =
            lines.find(|line| line.contains("started successfully on port")).expect("chromedriver says its port");
        let digits: String = ready.rsplit("port ").next().unwrap().chars().take_while(char::is_ascii_digit).collect();
        // Discard the rest of the output, so that ChromeDriver never blocks on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let profile = tempfile::tempdir().unwrap();
        let mut browser = Self { driver, port: digits.parse().unwrap(), session: String::new(), _profile: profile };
        let data = format!("--user-data-dir={}", browser._profile.path().display());
        let args = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1280,900",
            &data,
        ];
        let wanted = json!({"goog:chromeOptions": {"args": args}, "goog:loggingPrefs": {"browser": "ALL"}});
        let answer = browser.call("POST", "/session", &json!({"capabilities": {"alwaysMatch": wanted}}));
        browser.session = answer["sessionId"].as_str().unwrap().to_owned();
        browser
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        self.try_call(method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn try_call(&self, method: &str, path: &str, body: &Value) -> Result<Value, Value> {
        let body = if method == "POST" { body.to_string() } else { String::new() };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            self.port,
            body.len()
        );
        let answer = web::exchange(self.port, format!("{head}{body}").as_bytes());
        let value = serde_json::from_str::<Value>(&answer.body).unwrap()["value"].take();
        if answer.status == 200 { Ok(value) } else { Err(value) }
    }

    fn of(&self, path: &str) -> String {
        format!("/session/{}{path}", self.session)
    }

    /// Opens an address.
    pub fn open(&self, url: &str) {
        self.call("POST", &self.of("/url"), &json!({"url": url}));
    }

    /// The URL of the page.
    pub fn address(&self) -> String {
        self.call("GET", &self.of("/url"), &Value::Null).as_str().unwrap().to_owned()
    }

    /// The first element that matches a CSS selector; waits until there is one.
    pub fn element(&self, selector: &str) -> Element {
        let mut found = None;
        self.wait(&format!("there is {selector}"), || {
            found = self.elements(selector).into_iter().next();
            found.is_some()
        });
        found.unwrap()
    }

    /// All elements that currently match a CSS selector.
    pub fn elements(&self, selector: &str) -> Vec<Element> {
        let wanted = json!({"using": "css selector", "value": selector});
        let found = self.call("POST", &self.of("/elements"), &wanted);
        found
            .as_array()
            .unwrap()
            .iter()
            .map(|element| Element(element[ELEMENT_KEY].as_str().unwrap().to_owned()))
            .collect()
    }

    /// The visible text of the first matching element; empty if there is none.
    pub fn text(&self, selector: &str) -> String {
        self.texts(selector).into_iter().next().unwrap_or_default()
    }

    /// The visible texts of all matching elements. Elements that disappear meanwhile are left out.
    pub fn texts(&self, selector: &str) -> Vec<String> {
        let text = |element: Element| {
            let path = self.of(&format!("/element/{}/text", element.0));
            self.try_call("GET", &path, &Value::Null).ok()?.as_str().map(str::to_owned)
        };
        self.elements(selector).into_iter().filter_map(text).collect()
    }

    pub fn click(&self, selector: &str) {
        // A page update may remove the element before it is clicked.
        self.wait(&format!("{selector} can be clicked"), || {
            let element = self.element(selector);
            self.try_call("POST", &self.of(&format!("/element/{}/click", element.0)), &json!({})).is_ok()
        });
    }

    /// Types into an element.
    pub fn fill(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        self.call("POST", &self.of(&format!("/element/{}/clear", element.0)), &json!({}));
        self.call("POST", &self.of(&format!("/element/{}/value", element.0)), &json!({"text": text}));
    }

    /// Presses keys on the element that has the focus.
    pub fn press(&self, keys: &str) {
        let pressed = keys.chars().flat_map(|key| ["keyDown", "keyUp"].map(|what| json!({"type": what, "value": key})));
        let actions = json!({"actions": [{"type": "key", "id": "keyboard", "actions": pressed.collect::<Vec<_>>()}]});
        self.call("POST", &self.of("/actions"), &actions);
    }

    /// Runs a script in the page, and returns its result.
    pub fn script(&self, script: &str) -> Value {
        self.call("POST", &self.of("/execute/sync"), &json!({"script": script, "args": []}))
    }

    /// The current HTML of the page.
    pub fn source(&self) -> String {
        self.call("GET", &self.of("/source"), &Value::Null).as_str().unwrap().to_owned()
    }

    /// A command of the DevTools protocol.
    pub fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.call("POST", &self.of("/goog/cdp/execute"), &json!({"cmd": command, "params": parameters}))
    }

    /// The browser's warnings and errors since the last call, such as blocked or failed scripts.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.call("POST", &self.of("/se/log"), &json!({"type": "browser"}));
        let serious =
            log.as_array().unwrap().iter().filter(|entry| entry["level"] == "SEVERE" || entry["level"] == "WARNING");
        serious.map(|entry| entry["message"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Waits until a condition is true; panics with the page if it never is.
    pub fn wait(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while !condition() {
            assert!(
                Instant::now() < deadline,
                "not within {WAIT_TIMEOUT:?}: {what}\n{}\n{}",
                self.address(),
                self.source()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the first element's text contains this.
    pub fn wait_for_text(&self, selector: &str, text: &str) {
        self.wait(&format!("{selector} shows {text:?}"), || self.text(selector).contains(text));
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium ends with its session, not with its driver. A failure here must not hide the failure of the test.
        let end = || drop(self.try_call("DELETE", &self.of(""), &Value::Null));
        if !self.session.is_empty() {
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(end));
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
