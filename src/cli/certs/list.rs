//! `nanite certs list`: what is in a directory, and how long it is good.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{Place, days_left};
use crate::certs::{Certificate, Content, Trust, TrustError, distinguished_name, timestamp};
use crate::cli::error::{CliError, Exit, chain};
use crate::cli::{output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};

#[derive(Debug, Args)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    place: Place,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<String>,
    domain: Option<String>,
    /// A revocation list of this CA: how many it revokes.
    #[serde(skip_serializing_if = "Option::is_none")]
    revokes: Option<usize>,
    revoked: bool,
    expires: String,
    days_left: i64,
    file: PathBuf,
}

#[derive(Serialize)]
struct Unusable {
    file: PathBuf,
    message: String,
}

#[derive(Default, Serialize)]
struct Listing {
    certificates: Vec<Row>,
    errors: Vec<Unusable>,
    /// Whether what is revoked is refused: only where there is a list.
    revocation_checked: bool,
}

impl List {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.place.directory();
        let now = SystemClock.now();
        let mut listing = Listing::default();
        let trust = directory.trust().ok();
        listing.revocation_checked = trust.as_ref().is_some_and(Trust::checks_revocation);
        let is_revoked = |certificate: &Certificate| {
            let verdict = trust.as_ref().map(|trust| trust.verify(certificate, &[], now));
            matches!(verdict, Some(Err(TrustError::Revoked | TrustError::AuthorityRevoked)))
        };
        for entry in directory.entries().map_err(|error| remedy::directory(&error, &directory))? {
            let file = entry.path;
            let row = |identity, ca, domain, not_after: Timestamp| Row {
                identity,
                ca,
                domain,
                revokes: None,
                revoked: false,
                expires: not_after.to_string(),
                days_left: days_left(not_after, now),
                file: file.clone(),
            };
            match entry.content {
                Ok(Content::Authorities(all)) => listing
                    .certificates
                    .extend(all.into_iter().map(|ca| row(None, Some(ca.subject), ca.domain, ca.not_after))),
                Ok(Content::Revocations(lists)) => {
                    listing.certificates.extend(lists.iter().filter_map(|list| {
                        let (issuer, next_update) =
                            (distinguished_name(list.issuer_name()), timestamp(list.next_update()?)?);
                        let revokes = list.get_revoked().map_or(0, |revoked| revoked.len());
                        Some(Row { revokes: Some(revokes), ..row(None, Some(issuer), None, next_update) })
                    }));
                }
                Ok(Content::Node(identity, held)) => {
                    listing.certificates.extend(held.certificates.iter().map(|held| {
                        let domain = Some(held.domain().to_owned());
                        let revoked = is_revoked(held);
                        Row { revoked, ..row(Some(identity.to_string()), None, domain, held.not_after()) }
                    }))
                }
                Err(error) => listing.errors.push(Unusable { message: chain(&error), file }),
            }
        }
        if self.json {
            output::json(&listing)?
        } else {
            print(&listing, directory.path())?
        }
        Ok(Exit::Success)
    }
}

fn print(listing: &Listing, directory: &Path) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    let title = |row: &Row| match (&row.identity, &row.domain) {
        (Some(identity), _) => identity.clone(),
        (None, None) if row.revokes.is_some() => format!("revoked: {}", row.revokes.unwrap_or(0)),
        (None, Some(domain)) => format!("CA of {domain}"),
        (None, None) => format!("CA {}", row.ca.as_deref().unwrap_or_default()),
    };
    if listing.certificates.is_empty() {
        output::note(&format!("no certificates in {}", directory.display()));
    } else {
        let width = listing.certificates.iter().map(|row| title(row).chars().count()).max().unwrap_or(0);
        let head = format!("{:<width$}  {:<20}  {:>9}  {}", "IDENTITY", "EXPIRES", "DAYS LEFT", "FILE");
        output::line(&paint.bold(&head))?;
        for row in &listing.certificates {
            let days = format!(
                "{:>9}",
                if row.revoked {
                    "revoked".into()
                } else if row.days_left < 0 {
                    "expired".into()
                } else {
                    row.days_left.to_string()
                }
            );
            let days = match row.days_left {
                _ if row.revoked => paint.red(&days),
                ..0 => paint.red(&days),
                0..7 => paint.yellow(&days),
                _ => days,
            };
            output::line(&format!("{:<width$}  {:<20}  {days}  {}", title(row), row.expires, row.file.display()))?;
        }
    }
    if !listing.revocation_checked && !listing.certificates.is_empty() {
        output::line("no crl.pem: nothing is checked for revocation")?;
    }
    for unusable in &listing.errors {
        output::note(&format!("{} {}", output::stderr_paint().yellow("warning:"), unusable.message));
    }
    Ok(())
}
