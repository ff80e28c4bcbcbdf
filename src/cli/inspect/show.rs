//! The report of `nanite inspect` for people.

use super::{Claims, Key, Opened, Refused, Report, Verdict};
use crate::cli::error::{CliError, Exit};
use crate::cli::output;
use crate::cli::output::{counted, printable};
use crate::serializer::OpenErrorKind;

/// Prints it on stdout.
pub(super) fn print(report: &Report) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    match &report.claims {
        Some(claims) => {
            let title = format!("{}, {}", claims.kind, counted(report.bytes, "byte"));
            let unverified = paint.yellow("what it says of itself, NOT VERIFIED:");
            output::line(&format!("{}: {unverified}", paint.bold(&title)))?;
            print_claims(claims)?;
        }
        None => output::line(&paint.bold(&format!("{}, not readable", counted(report.bytes, "byte"))))?,
    }
    for verdict in report.verdict.iter().chain(&report.at_issue) {
        output::line("")?;
        print_verdict(verdict)?;
    }
    if let Some(opened) = &report.opened {
        output::line("")?;
        print_opened(opened)?;
    }
    Ok(())
}

fn print_claims(claims: &Claims) -> Result<(), CliError> {
    let none = || "none".to_owned();
    let protection = if claims.encrypted { "signed and encrypted" } else { "signed, in the clear" };
    let mut fields = vec![
        ("from", claims.from.to_string()),
        ("signed by", key(&claims.signer)),
        ("to", claims.to.join(", ")),
        ("protection", protection.to_owned()),
        ("issued", claims.issued_at.clone()),
        ("expires", format!("{} ({})", claims.expires_at, claims.class)),
        ("id", claims.id.to_string()),
        ("answers", claims.in_reply_to.map_or_else(none, |id| id.to_string())),
        ("sender", format!("process {}, message {}", claims.instance, claims.sequence)),
        ("codec", claims.codec.clone()),
    ];
    fields.extend(claims.recipients.iter().map(|recipient| ("for the", key(recipient))));
    fields.extend(claims.certificates.iter().map(|certificate| ("carries", certificate.clone())));
    fields.iter().try_for_each(|(label, value)| output::line(&format!("  {label:<10}  {}", printable(value, false))))
}

fn key(key: &Key) -> String {
    let of = key.of.as_ref().map(|identity| format!(", known here as {identity}'s")).unwrap_or_default();
    format!("{} key {}{of}", key.suite, key.key_id)
}

fn print_verdict(verdict: &Verdict) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    let node = verdict.node.as_ref().map_or_else(|| "every node".to_owned(), ToString::to_string);
    let channel = verdict.channel.map(|channel| format!(" in {channel}")).unwrap_or_default();
    let said = if verdict.accepted { paint.green("ACCEPTED") } else { paint.red("REFUSED") };
    output::line(&format!("{said} by {node}{channel}, at {}", verdict.at))?;
    let end = verdict.refused.as_ref().map_or(usize::MAX, |refused| refused.step);
    for (at, kind) in OpenErrorKind::ALL.into_iter().enumerate().map(|(at, kind)| (at + 1, kind)) {
        let state = match &verdict.refused {
            Some(refused) if at == end => paint.red(&format!("REFUSED: {}", printable(&refused.why, false))),
            _ if at > end => paint.dim("not reached"),
            _ => paint.green("passed"),
        };
        output::line(&format!("  {at:>2} {:<16}  {state}", kind.as_str()))?;
    }
    match &verdict.refused {
        Some(Refused { remedy, .. }) => output::line(&format!("  {} {remedy}", paint.cyan("help:"))),
        None => Ok(()),
    }
}

fn print_opened(opened: &Opened) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    let signer = format!("signed by {}, VERIFIED", opened.signer);
    output::line(&format!("{} (certificate {})", paint.bold(&signer), opened.certificate))?;
    let packet = serde_json::to_string_pretty(&opened.packet).map_err(|error| CliError::of(Exit::Failure, &error))?;
    output::line(&printable(&packet, true))
}
