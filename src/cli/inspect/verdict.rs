//! What a node would say of a message: by the node's own serializer, so that the steps are the real ones.

use super::{Opened, Refused, Verdict, step};
use crate::certs::DirectoryCertificateStore;
use crate::cli::error::CliError;
use crate::cli::{Global, identity};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::Identity;
use crate::security::{Header, SecureSerializer};
use crate::serializer::{Inbound, InboundQueue, OpenContext, OpenError, OpenErrorKind, Serializer};

/// What came of asking a node.
pub(super) struct Judged {
    pub verdict: Verdict,
    pub at_issue: Option<Verdict>,
    pub opened: Option<Opened>,
    /// Whose the keys of the directory are.
    pub known: Vec<(String, Identity)>,
}

/// Has the node of the reader's role open a message: now, and where time is all that is against it, when it says it was made.
///
/// # Errors
/// [`CliError`] when the node's certificates cannot be used.
pub(super) fn judge(
    global: &Global,
    who: &identity::IdentityArgs,
    header: &Header,
    channel: InboundQueue,
    bytes: &[u8],
) -> Result<Judged, CliError> {
    let now = SystemClock.now();
    // A node that was there when the message was made: one that has started since refuses all live ones.
    let secure = who.secure(&global.config, channel.reader(), Some(now.min(header.issued_at)))?;
    let directory = who.directory(&global.config, channel.reader())?;
    let known = DirectoryCertificateStore::open(directory.path(), now).map(|store| store.certificates());
    let known = known.unwrap_or_default();
    let known = known.iter().map(|one| (one.key_id().to_string(), one.identity().clone())).collect();
    let say = |at: Timestamp, error: Option<&OpenError>| Verdict {
        node: Some(secure.identity.clone()),
        channel: Some(channel.as_str()),
        at: at.to_string(),
        accepted: error.is_none(),
        refused: error.map(refused),
    };
    let (verdict, at_issue, opened) = match open(&secure.serializer, channel, bytes, now) {
        Ok(inbound) => (say(now, None), None, opened(inbound)),
        Err(error) if depends_on_time(error.kind) => {
            let then = header.issued_at;
            let first = say(now, Some(&error));
            match open(&secure.serializer, channel, bytes, then) {
                Ok(inbound) => (first, Some(say(then, None)), opened(inbound)),
                Err(other) if other == error => (first, None, None),
                Err(other) => (first, Some(say(then, Some(&other))), None),
            }
        }
        Err(error) => (say(now, Some(&error)), None, None),
    };
    Ok(Judged { verdict, at_issue, opened, known })
}

fn open(
    serializer: &SecureSerializer,
    channel: InboundQueue,
    bytes: &[u8],
    at: Timestamp,
) -> Result<Inbound, OpenError> {
    serializer.open(bytes, &OpenContext::new(channel, at))
}

fn depends_on_time(kind: OpenErrorKind) -> bool {
    matches!(kind, OpenErrorKind::NotFresh | OpenErrorKind::UnknownSigner | OpenErrorKind::BadCertificate)
}

fn opened(inbound: Inbound) -> Option<Opened> {
    let (signer, certificate) = {
        let verified = inbound.signer()?;
        let certificate = verified.certificate().iter().map(|byte| format!("{byte:02x}")).collect();
        (verified.signer().clone(), certificate)
    };
    Some(Opened { signer, certificate, packet: inbound.packet })
}

/// What every node says of bytes that it cannot read.
pub(super) fn unreadable(error: &OpenError) -> Verdict {
    let at = SystemClock.now().to_string();
    Verdict { node: None, channel: None, at, accepted: false, refused: Some(refused(error)) }
}

fn refused(error: &OpenError) -> Refused {
    Refused {
        step: step(error.kind),
        kind: error.kind.as_str(),
        why: error.why.to_string(),
        remedy: remedy(error.kind),
    }
}

/// What to do about a refusal.
fn remedy(kind: OpenErrorKind) -> &'static str {
    use OpenErrorKind as K;
    match kind {
        K::TooLarge => "send less: put large data elsewhere, and its place in the payload",
        K::Malformed => {
            "it was cut or changed on its way, or is no secure message: capture it again, as raw bytes (not base64)"
        }
        K::Unsupported => {
            "its sender is of another version, or is not nanite: there are two suites and one version, and no others"
        }
        K::WrongDestination => {
            "look at it as the node it is for (`--token NAME`), or in the queue where it was (`--channel QUEUE`); on a running \
             system, somebody has moved it"
        }
        K::NotFresh => {
            "compare the clocks of both machines; a message that came too late has waited too long in a queue: its sender has to \
             send it again"
        }
        K::UnknownSigner => {
            "put its sender's certificate into the directory of certificates; after a renewal, the new one as well"
        }
        K::BadCertificate => "see what is wrong with `nanite certs verify`, and issue its sender a new certificate",
        K::BadSignature => {
            "it was changed on its way, or another than its sender made it: do not trust the way it came"
        }
        K::Replayed => "it has been opened before: a copy does no harm, and can be dropped",
        K::NotAuthorized => "its sender's role or the rules do not let it send this: see `nanite policy explain`",
        K::CannotOpen => {
            "it was sealed for another key: its sender may know an older certificate of this node; give it the present one"
        }
        K::BadBody => "its sender is faulty, or of another version: what it signed does not fit its own header",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u04_every_step_has_its_number_and_remedy() {
        for (at, kind) in OpenErrorKind::ALL.into_iter().enumerate() {
            let refused = refused(&OpenError::new(kind, "why"));
            assert_eq!((refused.step, refused.kind), (at + 1, kind.as_str()));
            assert!(refused.remedy.len() > 20, "{kind}");
        }
    }
}
