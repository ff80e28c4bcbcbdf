//! Where lines come from: an editor on a terminal, or stdin as it is. A thread of its own, since both block.

use std::io::{self, BufRead, IsTerminal, Read};
use std::sync::mpsc;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Context, Editor, Helper};
use tokio::sync::oneshot;

use super::history::{History, KEPT};
use crate::cli::error::{CliError, Exit};
use crate::transport::MAX_BODY_BYTES;

const PROMPT: &str = "nanite> ";
/// The longest line that is read from what is no terminal, in bytes: the largest payload and its options.
const LONGEST: u64 = MAX_BODY_BYTES as u64 + 64 * 1024;

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entered {
    /// A line, without its end.
    Line(String),
    /// Ctrl-C at the prompt.
    Interrupted,
    /// Ctrl-D, or the end of stdin.
    End,
}

/// Completes a line up to a cursor: where the word begins, and what it can be.
pub(super) type Complete = Box<dyn Fn(&str, usize) -> (usize, Vec<String>) + Send>;

type Answer = Result<Entered, String>;

/// The lines.
pub(super) struct Input(mpsc::Sender<oneshot::Sender<Answer>>);

/// Whether a person types.
pub(super) fn is_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

impl Input {
    /// Lines that a person edits.
    pub(super) fn editor(history: History, complete: Complete) -> Self {
        Self::start(move |asked| edit(&history, complete, &asked))
    }

    /// The lines of stdin.
    pub(super) fn stdin() -> Self {
        Self::start(|asked| {
            let mut lines = io::stdin().lock();
            for answer in asked {
                let _ = answer.send(read_line(&mut lines));
            }
        })
    }

    fn start(read: impl FnOnce(mpsc::Receiver<oneshot::Sender<Answer>>) + Send + 'static) -> Self {
        let (ask, asked) = mpsc::channel();
        std::thread::spawn(move || read(asked));
        Self(ask)
    }

    /// The next line.
    ///
    /// # Errors
    /// [`CliError`] when nothing can be read any more.
    pub(super) async fn next(&self) -> Result<Entered, CliError> {
        let failed = |why: String| CliError::new(Exit::Failure, format!("cannot read commands: {why}"));
        let (answer, read) = oneshot::channel();
        self.0.send(answer).map_err(|_| failed("the editor has ended".into()))?;
        read.await.map_err(|_| failed("the editor has ended".into()))?.map_err(failed)
    }
}

fn edit(history: &History, complete: Complete, asked: &mpsc::Receiver<oneshot::Sender<Answer>>) {
    let config = Config::builder().completion_type(CompletionType::List).history_ignore_space(true);
    let config = config.max_history_size(KEPT).map(rustyline::config::Builder::build);
    let editor = config.and_then(|config| {
        let memory = MemHistory::with_config(&config);
        Editor::<Completing, MemHistory>::with_history(config, memory)
    });
    let mut editor = match editor {
        Ok(editor) => editor,
        Err(error) => {
            if let Ok(answer) = asked.recv() {
                let _ = answer.send(Err(error.to_string()));
            }
            return;
        }
    };
    editor.set_helper(Some(Completing(complete)));
    for line in history.load() {
        let _ = editor.add_history_entry(line);
    }
    while let Ok(answer) = asked.recv() {
        let read = match editor.readline(PROMPT) {
            Ok(line) => {
                if !line.trim().is_empty() && editor.add_history_entry(line.as_str()).unwrap_or(false) {
                    history.keep(&line);
                }
                Ok(Entered::Line(line))
            }
            Err(ReadlineError::Interrupted) => Ok(Entered::Interrupted),
            Err(ReadlineError::Eof) => Ok(Entered::End),
            Err(error) => Err(error.to_string()),
        };
        let _ = answer.send(read);
    }
}

fn read_line(lines: &mut impl BufRead) -> Answer {
    let mut line = Vec::new();
    lines.take(LONGEST).read_until(b'\n', &mut line).map_err(|error| error.to_string())?;
    if line.is_empty() {
        return Ok(Entered::End);
    }
    if line.len() as u64 == LONGEST && !line.ends_with(b"\n") {
        return Err(format!("a line is longer than {LONGEST} bytes"));
    }
    let line = String::from_utf8(line).map_err(|_| "a line is not UTF-8".to_owned())?;
    Ok(Entered::Line(line.trim_end_matches(['\n', '\r']).to_owned()))
}

struct Completing(Complete);

impl Completer for Completing {
    type Candidate = String;

    fn complete(&self, line: &str, cursor: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok((self.0)(line, cursor))
    }
}

impl Hinter for Completing {
    type Hint = String;
}

impl Highlighter for Completing {}

impl Validator for Completing {}

impl Helper for Completing {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n21_lines_are_read_to_their_end_and_not_further() {
        let mut lines = &b"agents\r\n\nlast"[..];
        for expected in ["agents", "", "last"] {
            assert_eq!(read_line(&mut lines), Ok(Entered::Line(expected.into())));
        }
        assert_eq!(read_line(&mut lines), Ok(Entered::End));
        assert!(read_line(&mut &b"\xff\n"[..]).unwrap_err().contains("UTF-8"));
        let endless = io::repeat(b'x');
        assert!(read_line(&mut io::BufReader::new(endless)).unwrap_err().contains("longer than"));
    }
}
