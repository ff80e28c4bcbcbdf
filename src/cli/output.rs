//! What commands print: data on stdout, notes and errors on stderr. Nothing that another node wrote can control the terminal.

use std::borrow::Cow;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use comfy_table::{ContentArrangement, Table, presets};

use super::error::{CliError, Exit, Result};
use crate::packet::{Failure, Identity};

/// Tables are not fitted into terminals that are narrower, in columns. A terminal of unknown width reports 0.
const MIN_TABLE_WIDTH: u16 = 40;

/// Prints text and a newline on stdout.
pub(super) fn line(text: &str) -> Result<()> {
    write(format!("{text}\n").as_bytes())
}

/// Prints a value as indented JSON on stdout.
pub(super) fn json<T: serde::Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::of(Exit::Failure, &error))?;
    line(&escaped_json(&text))
}

/// Prints a value as JSON if `json` is set, and with `print` if not.
pub(super) fn json_or<T: serde::Serialize>(
    json: bool,
    value: &T,
    print: impl FnOnce(&T) -> Result<(), CliError>,
) -> Result<(), CliError> {
    if json { self::json(value) } else { print(value) }
}

/// Writes bytes to stdout.
pub(super) fn write(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => CliError::broken_pipe(),
        _ => CliError::of(Exit::Failure, &error).context("cannot write to stdout"),
    })
}

/// Prints a line on stderr. A failure is ignored: there is nowhere to report it.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints a prompt on stderr, without a newline.
#[cfg(feature = "admin")]
pub(super) fn prompt(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = write!(stderr, "{text}").and_then(|()| stderr.flush());
}

/// Prints an error and its remedy on stderr; returns the exit code.
pub(super) fn report(error: &CliError) -> ExitCode {
    if !error.is_silent() {
        let paint = stderr_paint();
        note(&format!("{} {}", paint.red("error:"), printable(error.message(), true)));
        if let Some(remedy) = error.remedy() {
            note(&format!("{} {}", paint.cyan("help:"), printable(remedy, true)));
        }
    }
    error.exit().into()
}

/// Prints `empty` as JSON if no agent offers the service.
pub(super) fn or_empty_json<T>(result: Result<T>, as_json: bool, empty: &impl serde::Serialize) -> Result<T> {
    match &result {
        Err(error) if as_json && error.exit() == Exit::NotOffered => json(empty)?,
        _ => {}
    }
    result
}

/// A failure in one line. A message that only repeats the code is left out.
pub(super) fn failure_line(from: &Identity, failure: &Failure) -> String {
    let line = match failure.code.as_str() {
        code if failure.message.eq_ignore_ascii_case(code) => format!("{from}: {code}"),
        _ => format!("{from}: {failure}"),
    };
    printable(&line, false).into_owned()
}

/// Whether to use colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint(bool);

/// Colours for stdout, when it is a terminal that has them and NO_COLOR is not set.
pub(super) fn stdout_paint() -> Paint {
    Paint(AutoStream::choice(&std::io::stdout()) != ColorChoice::Never)
}

/// Colours for stderr, under the same conditions.
pub(super) fn stderr_paint() -> Paint {
    Paint(AutoStream::choice(&std::io::stderr()) != ColorChoice::Never)
}

impl Paint {
    fn with(self, style: Style, text: &str) -> String {
        if self.0 { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }
}

macro_rules! styles {
    ($($name:ident: $style:expr;)*) => {
        impl Paint {
            $(pub(super) fn $name(self, text: &str) -> String {
                self.with($style, text)
            })*
        }
    };
}

styles! {
    red: AnsiColor::Red.on_default().bold();
    green: AnsiColor::Green.on_default();
    yellow: AnsiColor::Yellow.on_default();
    cyan: AnsiColor::Cyan.on_default().bold();
    bold: Style::new().bold();
    dim: Style::new().dimmed();
}

/// Prints rows under their headings, if there are any: with rules on a terminal, in plain columns in a pipe.
pub(super) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> Result<()> {
    if rows.is_empty() {
        Ok(())
    } else if std::io::stdout().is_terminal() {
        line(&ruled_table(headings, rows))
    } else {
        plain_table(headings, rows).iter().try_for_each(|row| line(row))
    }
}

fn ruled_table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    if table.width().is_some_and(|width| width >= MIN_TABLE_WIDTH) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.set_header(headings);
    for row in rows {
        table.add_row(row.each_ref().map(|cell| printable(cell, true).into_owned()));
    }
    table.to_string()
}

/// One line for each row; columns are separated by at least two spaces.
fn plain_table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> Vec<String> {
    let one_line = |cell: &String| printable(&cell.replace('\n', ", "), false).into_owned();
    let mut all = vec![headings.map(str::to_owned)];
    all.extend(rows.iter().map(|row| row.each_ref().map(one_line)));
    let mut widths = [0; N];
    for row in &all {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    all.iter().map(line).collect()
}

/// A number and its noun: `1 agent`, `2 agents`.
pub(super) fn counted(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// The text with control characters and direction marks escaped. `lines`: newlines and tabs are kept.
pub(super) fn printable(text: &str, lines: bool) -> Cow<'_, str> {
    escaped(text, |c| lines && matches!(c, '\n' | '\t'), |c| c.escape_default().to_string())
}

/// The same JSON value with the characters escaped that JSON itself does not escape: DEL, C1 controls and direction marks.
fn escaped_json(json: &str) -> Cow<'_, str> {
    // They stand inside strings, and fit into four digits.
    escaped(json, |c| c == '\n', |c| format!("\\u{:04x}", u32::from(c)))
}

/// Escapes what could control a terminal or reorder text, except what `keep` allows.
fn escaped(text: &str, keep: impl Fn(char) -> bool, escape: impl Fn(char) -> String) -> Cow<'_, str> {
    let bidi_mark =
        |c| matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let unsafe_char = |c: char| (c.is_control() || bidi_mark(c)) && !keep(c);
    if !text.contains(unsafe_char) {
        return Cow::Borrowed(text);
    }
    text.chars().map(|c| if unsafe_char(c) { escape(c) } else { c.to_string() }).collect::<String>().into()
}

/// The text with the password of every URL in it replaced by `***`: for messages that repeat their input.
pub(super) fn without_passwords(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        shown.push_str(before);
        shown.push_str("://");
        rest = after;
        // The user information ends at the last @ before a space or quote, whatever the password contains.
        let end = after.find(|c: char| c.is_whitespace() || matches!(c, '"' | '`')).unwrap_or(after.len());
        let (url, _) = after.split_at(end);
        if let Some((info, _)) = url.rsplit_once('@')
            && let Some((user, _)) = info.split_once(':')
        {
            shown.push_str(user);
            shown.push_str(":***");
            rest = after.get(info.len()..).unwrap_or_default();
        }
    }
    shown.push_str(rest);
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_piped_tables_are_plain_columns() {
        let rows = [["nanite-fred".into(), "/a/b\n/c/d".into()], ["nanite-bo".into(), "/x\x1b[2J".into()]];
        assert_eq!(
            plain_table(["AGENT", "SERVICES"], &rows),
            ["AGENT        SERVICES", "nanite-fred  /a/b, /c/d", "nanite-bo    /x\\u{1b}[2J"]
        );
        assert!(ruled_table(["AGENT", "SERVICES"], &rows).contains("/c/d"));
    }

    #[test]
    fn u02_control_characters_are_escaped() {
        for (text, lines, shown) in [
            ("plain, ünïcode", false, "plain, ünïcode"),
            ("\x1b[2Jhi\x07", true, "\\u{1b}[2Jhi\\u{7}"),
            ("a\nb\tc", true, "a\nb\tc"),
            ("a\nb", false, "a\\nb"),
            ("evil\u{202e}gpj", true, "evil\\u{202e}gpj"),
            // C1 controls are controls, too.
            ("\u{9b}31m", true, "\\u{9b}31m"),
        ] {
            assert_eq!(printable(text, lines), shown);
        }
    }

    #[test]
    fn u02_json_escapes_control_characters() {
        let value = serde_json::json!({"a\u{202e}": "\u{9b}31m\u{7f}\x1b ünï"});
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = escaped_json(&text);
        assert!(!shown.contains(['\u{202e}', '\u{9b}', '\u{7f}', '\x1b']) && shown.contains("ünï"), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    #[test]
    fn s14_redacts_passwords_in_urls() {
        for (text, shown) in [
            ("amqp://u:secret@h:1/v", "amqp://u:***@h:1/v"),
            ("invalid `amqp://u:secret@h`, expected", "invalid `amqp://u:***@h`, expected"),
            ("amqp://u:sec@ret@h and amqp://v:secret@h", "amqp://u:***@h and amqp://v:***@h"),
            ("amqp://u:secret/@h", "amqp://u:***@h"),
            ("amqp://u@h", "amqp://u@h"),
            ("no url: a@b", "no url: a@b"),
            ("amqp://h:1", "amqp://h:1"),
        ] {
            assert_eq!(without_passwords(text), shown);
        }
    }

    #[test]
    fn counted_uses_singular_and_plural() {
        assert_eq!((counted(0, "agent"), counted(1, "agent")), ("0 agents".into(), "1 agent".into()));
    }
}
