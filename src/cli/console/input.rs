//! The lines of the console: from an editor on a terminal, with a history, or from stdin; and their words.

use std::fs::OpenOptions;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Context, Editor, Helper};
use tokio::sync::oneshot;

use crate::certs::files;
use crate::cli::error::{CliError, Exit, Result};
use crate::cli::state_dir;
use crate::transport::MAX_BODY_BYTES;

const PROMPT: &str = "nanite> ";
/// The longest line of a script: the largest payload and its options.
const MAX_SCRIPT_LINE_BYTES: u64 = MAX_BODY_BYTES as u64 + 64 * 1024;
const MAX_HISTORY_LINES: usize = 1000;
const MAX_HISTORY_LINE_BYTES: usize = 4096;
const MAX_HISTORY_BYTES: u64 = 8 * 1024 * 1024;

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its newline.
    Text(String),
    /// Ctrl-C at the prompt.
    Interrupted,
    /// Ctrl-D, or the end of stdin.
    End,
}

/// Completes a line up to a cursor: where the word begins, and the candidates for it.
pub(super) type Complete = Box<dyn Fn(&str, usize) -> (usize, Vec<String>) + Send>;

/// Where to send the next line.
type LineRequest = oneshot::Sender<Result<Line, String>>;

/// Reads lines in a thread of its own, because it blocks.
pub(super) struct Input(mpsc::Sender<LineRequest>);

/// Whether the console is interactive.
pub(super) fn is_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

impl Input {
    /// Lines from an editor.
    pub(super) fn editor(history: History, complete: Complete) -> Self {
        Self::start(move |requests| edit(&history, complete, &requests))
    }

    /// The lines of stdin.
    pub(super) fn stdin() -> Self {
        Self::start(|requests| {
            let mut stdin = io::stdin().lock();
            for request in requests {
                let _ = request.send(read_line(&mut stdin));
            }
        })
    }

    fn start(read: impl FnOnce(mpsc::Receiver<LineRequest>) + Send + 'static) -> Self {
        let (sender, requests) = mpsc::channel();
        std::thread::spawn(move || read(requests));
        Self(sender)
    }

    /// The next line.
    pub(super) async fn next(&self) -> Result<Line> {
        let failed = |why: String| CliError::new(Exit::Failure, format!("cannot read commands: {why}"));
        let (request, line) = oneshot::channel();
        // An editor that has ended drops the request.
        let _ = self.0.send(request);
        line.await.map_err(|_| failed("the editor has ended".into()))?.map_err(failed)
    }
}

fn edit(history: &History, complete: Complete, requests: &mpsc::Receiver<LineRequest>) {
    let config = Config::builder().completion_type(CompletionType::List).history_ignore_space(true);
    let config = config.max_history_size(MAX_HISTORY_LINES).map(rustyline::config::Builder::build);
    let editor = config.and_then(|config| {
        let memory = MemHistory::with_config(&config);
        Editor::<CompletionHelper, MemHistory>::with_history(config, memory)
    });
    let mut editor = match editor {
        Ok(editor) => editor,
        Err(error) => {
            if let Ok(request) = requests.recv() {
                let _ = request.send(Err(error.to_string()));
            }
            return;
        }
    };
    editor.set_helper(Some(CompletionHelper(complete)));
    for line in history.load() {
        let _ = editor.add_history_entry(line);
    }
    while let Ok(request) = requests.recv() {
        let line = match editor.readline(PROMPT) {
            Ok(line) => {
                if !line.trim().is_empty() && editor.add_history_entry(line.as_str()).unwrap_or(false) {
                    history.add(&line);
                }
                Ok(Line::Text(line))
            }
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(error.to_string()),
        };
        let _ = request.send(line);
    }
}

fn read_line(input: &mut impl BufRead) -> Result<Line, String> {
    let mut line = Vec::new();
    input.take(MAX_SCRIPT_LINE_BYTES).read_until(b'\n', &mut line).map_err(|error| error.to_string())?;
    if line.is_empty() {
        return Ok(Line::End);
    }
    if line.len() as u64 == MAX_SCRIPT_LINE_BYTES && !line.ends_with(b"\n") {
        return Err(format!("a line is longer than {MAX_SCRIPT_LINE_BYTES} bytes"));
    }
    let line = String::from_utf8(line).map_err(|_| "a line is not UTF-8".to_owned())?;
    Ok(Line::Text(line.trim_end_matches(['\n', '\r']).to_owned()))
}

struct CompletionHelper(Complete);

impl Completer for CompletionHelper {
    type Candidate = String;

    fn complete(&self, line: &str, cursor: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok((self.0)(line, cursor))
    }
}

impl Hinter for CompletionHelper {
    type Hint = String;
}

impl Highlighter for CompletionHelper {}

impl Validator for CompletionHelper {}

impl Helper for CompletionHelper {}

/// Splits a line at spaces. A word that begins with `{`, `[` or `"` is a JSON value, with its quotes and spaces; if it is not complete,
/// it is the rest of the line. A word in single quotes is the text between them.
pub(super) fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while let Some(first) = rest.chars().next() {
        let (word, after) = match first {
            '\'' => quoted(rest),
            '{' | '[' | '"' => rest.split_at(json_length(rest)),
            _ => rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len())),
        };
        words.push(word.to_owned());
        rest = after.trim_start();
    }
    words
}

/// The text between single quotes, and the rest.
fn quoted(text: &str) -> (&str, &str) {
    let inner = text.strip_prefix('\'').unwrap_or(text);
    inner.split_once('\'').unwrap_or((inner, ""))
}

/// The length of the JSON value at the beginning of a text.
fn json_length(text: &str) -> usize {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            '{' | '[' if !in_string => depth += 1,
            '}' | ']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 && !in_string {
            return at + c.len_utf8();
        }
    }
    text.len()
}

/// The lines of earlier consoles, in a file that only its owner can read. Without a path, none are saved.
#[derive(Debug)]
pub(super) struct History(Option<PathBuf>);

impl History {
    /// The history in this directory.
    pub(super) fn within(directory: Option<PathBuf>) -> Self {
        Self(directory.map(|directory| directory.join("console-history")))
    }

    /// The saved lines, oldest first. A file with too many lines is cut.
    fn load(&self) -> Vec<String> {
        let Some(path) = &self.0 else { return Vec::new() };
        let mut text = Vec::new();
        let file = state_dir::open(path, OpenOptions::new().read(true));
        match file.and_then(|file| file.take(MAX_HISTORY_BYTES).read_to_end(&mut text)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                log_failure(path, "read", Err(error));
                return Vec::new();
            }
        }
        let text = String::from_utf8_lossy(&text);
        // Lines with control characters were not typed here, and could control the terminal.
        let mut lines: Vec<String> =
            text.lines().filter(|line| !line.contains(char::is_control)).map(str::to_owned).collect();
        if lines.len() > MAX_HISTORY_LINES {
            lines.drain(..lines.len() - MAX_HISTORY_LINES);
            let cut = lines.join("\n") + "\n";
            log_failure(path, "cut", files::write(path, cut.as_bytes(), files::SECRET, true));
        }
        lines
    }

    /// Saves a line, unless it begins with a space.
    fn add(&self, line: &str) {
        let Some(path) = &self.0 else { return };
        if line.starts_with(' ') || line.len() > MAX_HISTORY_LINE_BYTES || line.contains(char::is_control) {
            return;
        }
        let saved = files::create_directory(path.parent().unwrap_or(path)).and_then(|()| {
            let mut file = state_dir::open(path, OpenOptions::new().append(true).create(true).mode(files::SECRET))?;
            file.write_all(format!("{line}\n").as_bytes())
        });
        log_failure(path, "add to", saved);
    }
}

fn log_failure(path: &Path, action: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(path = %path.display(), %error, "failed to {action} the history");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn n21_script_lines_are_bounded() {
        let mut lines = &b"agents\r\n\nlast"[..];
        for expected in ["agents", "", "last"] {
            assert_eq!(read_line(&mut lines), Ok(Line::Text(expected.into())));
        }
        assert_eq!(read_line(&mut lines), Ok(Line::End));
        assert!(read_line(&mut &b"\xff\n"[..]).unwrap_err().contains("UTF-8"));
        let endless = io::repeat(b'x');
        assert!(read_line(&mut io::BufReader::new(endless)).unwrap_err().contains("longer than"));
    }

    #[test]
    fn n21_console_splits_words_and_keeps_json_whole() {
        for (line, words) in [
            ("", &[][..]),
            ("  agents\t", &["agents"]),
            ("request /a/b hello --tag big", &["request", "/a/b", "hello", "--tag", "big"]),
            (r#"/a/b {"a": [1, "x y}"]} --json"#, &["/a/b", r#"{"a": [1, "x y}"]}"#, "--json"]),
            (r#"/a/b [1, 2] x"#, &["/a/b", "[1, 2]", "x"]),
            (r#"/a/b "a \" b" x"#, &["/a/b", r#""a \" b""#, "x"]),
            ("/a/b 'two words' x", &["/a/b", "two words", "x"]),
            ("/a/b '{\"a\": 1}'", &["/a/b", "{\"a\": 1}"]),
            ("/a/b {\"a\": 1 --json", &["/a/b", "{\"a\": 1 --json"]),
            ("/a/b 'open x", &["/a/b", "open x"]),
            ("/a/b ünï \"ü\"x", &["/a/b", "ünï", "\"ü\"", "x"]),
            ("/a/b {\"a\":1}{\"b\":2}", &["/a/b", "{\"a\":1}", "{\"b\":2}"]),
        ] {
            assert_eq!(split(line), words, "{line:?}");
        }
    }

    #[test]
    fn n21_history_is_private_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::within(Some(dir.path().join("nanite")));
        assert!(history.load().is_empty());
        history.add("agents");
        history.add(" request /secret/thing");
        history.add(&"x".repeat(MAX_HISTORY_LINE_BYTES + 1));
        history.add("a\u{1b}[2J");
        history.add("services");
        assert_eq!(history.load(), ["agents", "services"]);
        let path = dir.path().join("nanite/console-history");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for n in 0..2 * MAX_HISTORY_LINES {
            history.add(&format!("ping {n}"));
        }
        let lines = history.load();
        assert_eq!((lines.len(), lines[MAX_HISTORY_LINES - 1].as_str()), (MAX_HISTORY_LINES, "ping 1999"));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), MAX_HISTORY_LINES);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        History::within(None).add("nowhere");
    }

    #[test]
    fn n21_history_does_not_follow_symlinks() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "precious\n").unwrap();
        symlink(&victim, dir.path().join("console-history")).unwrap();
        let history = History::within(Some(dir.path().to_owned()));
        history.add("agents");
        assert!(history.load().is_empty());
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious\n");
    }
}
