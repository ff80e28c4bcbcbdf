//! How values are given on the command line and in files: durations, sizes, agents, payloads, and the files with passwords.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use zeroize::Zeroizing;

use super::error::{CliError, Exit, Result};
use crate::certs::{KeyType, RevocationReason};
use crate::packet::{Identity, MAX_PAYLOAD_DEPTH, Payload, Role, SelectorName};
use crate::serializer::InboundQueue;
use crate::transport::MAX_BODY_BYTES;

/// The longest duration: 100 years of 365 days.
const MAX_DURATION_SECONDS: u64 = 100 * 365 * 86_400;

macro_rules! value_enum {
    ($($type:ty: $all:expr;)*) => {$(
        impl ValueEnum for $type {
            fn value_variants<'a>() -> &'a [Self] {
                &$all
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                Some(PossibleValue::new(self.as_str()))
            }
        }
    )*};
}

value_enum! {
    Role: [Role::Agent, Role::Mapper];
    KeyType: KeyType::ALL;
    SelectorName: SelectorName::ALL;
}

/// Parses a duration: a whole number and one of `ms`, `s`, `m`, `h`, `d`, `w`. There is no default unit, because `30` could mean
/// seconds or days.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 6] =
        [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000), ("w", 7 * 86_400_000)];
    let (number, unit) = quantity(text, &UNITS).ok_or_else(|| {
        format!("'{text}' is not a duration: give a whole number and a unit, such as 15s, 5m, 12h or 30d")
    })?;
    let duration = number.checked_mul(unit).map(Duration::from_millis);
    let accepted = duration.filter(|duration| duration.as_secs() <= MAX_DURATION_SECONDS);
    accepted.ok_or_else(|| format!("'{text}' is too long: the maximum is 36500d"))
}

/// Parses a size in bytes: a whole number, alone or with `KiB`, `MiB`, `GiB` or `TiB`.
pub(super) fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 5] = [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
    quantity(text, &UNITS).and_then(|(number, unit)| number.checked_mul(unit)).ok_or_else(|| {
        format!(
            "'{text}' is not a size: give a number of bytes, or a number and a unit, such as 512KiB, 100MiB or 2GiB"
        )
    })
}

/// A whole number and the factor of the unit after it.
fn quantity(text: &str, units: &[(&str, u64)]) -> Option<(u64, u64)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    Some((number.parse().ok()?, *factor))
}

/// A size for people, such as `100.0 MiB`.
pub(super) fn display_size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

/// Parses the name or the identity of an agent.
pub(super) fn agent(text: &str) -> Result<Identity, String> {
    match text.parse::<Identity>() {
        Ok(identity) if identity.role() == Role::Agent => Ok(identity),
        _ => Identity::agent(text).map_err(|error| error.to_string()),
    }
}

/// The payload of a request: an argument, or stdin where the argument is `-`. JSON where it parses, else text. `note` prints notes.
pub(super) fn payload(argument: Option<&str>, note: impl Fn(&str)) -> Result<Payload> {
    let text = match argument {
        None => return Ok(Payload::default()),
        Some("-") => {
            let stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                note("reading the payload from the terminal; end it with Ctrl-D");
            }
            read_text(stdin)?
        }
        Some(text) => text.to_owned(),
    };
    if let Some(why) = broken_json(&text) {
        note(&format!("the payload is not JSON ({why}): it is sent as text"));
    }
    Ok(Payload::from_text(&text))
}

fn read_text(input: impl Read) -> Result<String> {
    let wrong = |what: String| CliError::usage(format!("the payload on stdin {what}"));
    let mut bytes = Vec::new();
    let limit = MAX_BODY_BYTES as u64;
    input.take(limit + 1).read_to_end(&mut bytes).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > limit {
        return Err(wrong(format!("is longer than {limit} bytes"))
            .help("put large data elsewhere, and send its location as the payload"));
    }
    let mut text = String::from_utf8(bytes).map_err(|_| {
        wrong("is neither JSON nor text".into()).help("encode bytes as text, for example with `base64`")
    })?;
    // `echo` and editors add a newline that is not part of the text.
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// The mistake in a text that begins like JSON but does not parse.
fn broken_json(text: &str) -> Option<String> {
    let error = serde_json::from_str::<Payload>(text).err()?;
    if !text.trim_start().starts_with(['{', '[', '"']) {
        return None;
    }
    Some(match error.classify() {
        serde_json::error::Category::Data => {
            format!("line {}: a duplicate key, or more than {MAX_PAYLOAD_DEPTH} levels", error.line())
        }
        _ => error.to_string(),
    })
}

/// The passphrase of a node's key.
#[derive(Debug, Default, clap::Args)]
pub(super) struct Passphrase {
    /// A file whose first line is the passphrase of the node's key.
    #[arg(long, value_name = "FILE", env = "NANITE_KEY_PASSPHRASE_FILE", hide_env = true)]
    passphrase_file: Option<PathBuf>,
}

/// The passphrase of the CA's key.
#[derive(Debug, Default, clap::Args)]
pub(super) struct CaPassphrase {
    /// A file whose first line is the passphrase of the CA's key.
    #[arg(long, value_name = "FILE", env = "NANITE_CA_PASSPHRASE_FILE", hide_env = true)]
    ca_passphrase_file: Option<PathBuf>,
}

impl Passphrase {
    /// Reads it, if a file is given.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>> {
        self.passphrase_file.as_deref().map(read_passphrase).transpose()
    }
}

impl CaPassphrase {
    /// Reads it, if a file is given.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>> {
        self.ca_passphrase_file.as_deref().map(read_passphrase).transpose()
    }
}

fn read_passphrase(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    SecretFile { kind: "passphrase", exit: Exit::Security, refused_mode: 0o177, max_bytes: 1024 }.first_line(path)
}

/// The password in a URL. Generous: in a malformed URL, whatever is before the last @ may be a password.
pub(super) fn password_of(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://").unwrap_or(("", url));
    let (info, _) = rest.rsplit_once('@')?;
    info.split_once(':').map(|(_, password)| password)
}

/// The password in a file: its first line.
pub(super) fn read_password(path: &Path) -> Result<Zeroizing<String>> {
    let file = SecretFile { kind: "password", exit: Exit::Usage, refused_mode: 0o077, max_bytes: 4096 };
    // Opening anything else, such as a named pipe, could block forever.
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(file.error(path, "is not a file"));
    }
    let line = file.first_line(path)?;
    let text = std::str::from_utf8(&line).map_err(|_| file.error(path, "is not UTF-8"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// A file with a secret in its first line, readable by its owner only.
struct SecretFile {
    kind: &'static str,
    exit: Exit,
    /// Permissions that it must not have.
    refused_mode: u32,
    max_bytes: u64,
}

impl SecretFile {
    fn error(&self, path: &Path, why: impl std::fmt::Display) -> CliError {
        CliError::new(self.exit, format!("the {} file {} {why}", self.kind, path.display()))
    }

    fn first_line(&self, path: &Path) -> Result<Zeroizing<Vec<u8>>> {
        let unreadable = |error: std::io::Error| {
            self.error(path, format!("cannot be read: {error}")).help("check the path, and who may read it")
        };
        let file = File::open(path).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.mode() & 0o7777;
        if mode & self.refused_mode != 0 {
            return Err(self
                .error(path, format!("has mode {mode:04o}: others than its owner can use it"))
                .help(format!("run `chmod 600 {}`", path.display())));
        }
        let mut text = Zeroizing::new(Vec::with_capacity(self.max_bytes as usize + 1));
        file.take(self.max_bytes + 1).read_to_end(&mut text).map_err(unreadable)?;
        let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let (kind, max) = (self.kind, self.max_bytes);
        match line.len() as u64 {
            0 => Err(self.error(path, "is empty").help(format!("write the {kind} into its first line"))),
            length if length > max => Err(self.error(path, format!("has a first line of more than {max} bytes"))),
            _ => Ok(Zeroizing::new(line.to_vec())),
        }
    }
}

impl ValueEnum for InboundQueue {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::AgentInbox, Self::AgentControl, Self::MapperInbox, Self::Presence, Self::Requests, Self::Offline]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.as_str()))
    }
}

impl ValueEnum for RevocationReason {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::KeyCompromise, Self::Superseded, Self::CessationOfOperation, Self::Unspecified]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::KeyCompromise => "key-compromise",
            Self::Superseded => "superseded",
            Self::CessationOfOperation => "cessation-of-operation",
            Self::Unspecified => "unspecified",
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn duration_parses_number_and_unit() {
        for (text, seconds) in [("15s", 15), ("5m", 300), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("36500d"), Ok(Duration::from_secs(MAX_DURATION_SECONDS)));
    }

    #[test]
    fn duration_rejects_invalid_text() {
        for text in ["", "30", "d", "-1s", "1.5h", "1 s", "1S", "5 minutes", "é", "1é", "+5s", "1sm"] {
            assert!(duration(text).unwrap_err().contains("is not a duration"), "{text:?}");
        }
        for text in ["36501d", "18446744073709551615w", "18446744073709551615ms"] {
            assert!(duration(text).unwrap_err().contains("too long"), "{text:?}");
        }
        assert!(duration("18446744073709551616s").unwrap_err().contains("is not a duration"));
    }

    #[test]
    fn n16_size_parses_bytes_with_and_without_unit() {
        for (text, bytes) in [("0", 0), ("17", 17), ("100MiB", 100 << 20), ("2GiB", 2 << 30)] {
            assert_eq!(size(text), Ok(bytes));
        }
        for bad in ["", "MiB", "-1", "1.5GiB", "1 GiB", "1GB", "1gib", "99999999TiB", "x"] {
            assert!(size(bad).unwrap_err().contains("is not a size"), "{bad:?}");
        }
    }

    #[test]
    fn n19_sizes_are_displayed_with_unit() {
        let shown = [0, 1023, 1024, 104_857_600, 1 << 40].map(display_size);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "100.0 MiB", "1.0 TiB"]);
    }

    #[test]
    fn u02_agent_argument_accepts_name_or_identity() {
        for (text, identity) in
            [("fred", "nanite-fred"), ("nanite-fred", "nanite-fred"), ("mapper-x", "nanite-mapper-x")]
        {
            assert_eq!(agent(text).unwrap().as_str(), identity);
        }
        assert!(agent("a b").unwrap_err().contains("a name is"));
        assert!(agent("nanite-").is_ok(), "an agent may have that name");
    }

    #[test]
    fn u02_payload_is_json_or_text_and_broken_json_is_reported() {
        for text in [r#"{"a":1}"#, "hello", "-5x"] {
            assert_eq!(broken_json(text), None);
        }
        assert!(broken_json(r#"{"a":1"#).unwrap().contains("EOF"));
        assert!(broken_json(r#"{"a":1,"a":2}"#).unwrap().contains("duplicate"));
        assert_eq!(read_text(&b"hi\n"[..]).unwrap(), "hi");
        assert!(read_text(&b"\xff"[..]).unwrap_err().message().contains("neither JSON nor text"));
    }

    #[test]
    fn s14_password_file_must_be_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let refused = |text: &[u8], mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            read_password(&path).unwrap_err()
        };
        let error = refused(b"secret", 0o604);
        assert!(error.message().contains("mode 0604"), "{error:?}");
        assert!(!format!("{error:?}").contains("secret"));
        std::fs::write(&path, "secret\nrest").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read_password(&path).unwrap().as_str(), "secret", "the first line");
        assert!(refused(b"", 0o600).message().contains("is empty"));
        assert!(refused(&[b'x'; 5000], 0o600).message().contains("more than 4096 bytes"));
        assert!(refused(b"\xff\n", 0o600).message().contains("is not UTF-8"));
        assert!(read_password(dir.path()).unwrap_err().message().contains("not a file"));
        assert!(read_password(&dir.path().join("none")).unwrap_err().message().contains("cannot be read"));
    }

    #[test]
    fn s14_detects_password_in_url() {
        for url in ["amqp://u:p@h", "amqp://u:p/@h", "amqp://:p@h", "amqp://u:p@x@h", "u:p@h"] {
            assert!(password_of(url).is_some(), "{url}");
        }
        for url in ["amqp://h:1/v", "amqp://u@h:1", "amqp://h"] {
            assert!(password_of(url).is_none(), "{url}");
        }
    }
}
