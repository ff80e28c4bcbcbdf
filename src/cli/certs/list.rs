//! `nanite certs list`: what is in a directory, and how long it is good.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{Place, days_left};
use crate::certs::Content;
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
}

impl List {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.place.directory();
        let now = SystemClock.now();
        let mut listing = Listing::default();
        for entry in directory.entries().map_err(|error| remedy::directory(&error, &directory))? {
            let file = entry.path;
            let row = |identity, ca, domain, not_after: Timestamp| Row {
                identity,
                ca,
                domain,
                expires: not_after.to_string(),
                days_left: days_left(not_after, now),
                file: file.clone(),
            };
            match entry.content {
                Ok(Content::Authorities(all)) => listing
                    .certificates
                    .extend(all.into_iter().map(|ca| row(None, Some(ca.subject), ca.domain, ca.not_after))),
                Ok(Content::Node(identity, held)) => listing.certificates.extend(held.nodes.iter().map(|held| {
                    row(Some(identity.to_string()), None, Some(held.domain().to_owned()), held.not_after())
                })),
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
            let days = format!("{:>9}", if row.days_left < 0 { "expired".into() } else { row.days_left.to_string() });
            let days = match row.days_left {
                ..0 => paint.red(&days),
                0..7 => paint.yellow(&days),
                _ => days,
            };
            output::line(&format!("{:<width$}  {:<20}  {days}  {}", title(row), row.expires, row.file.display()))?;
        }
    }
    for unusable in &listing.errors {
        output::note(&format!("{} {}", output::stderr_paint().yellow("warning:"), unusable.message));
    }
    Ok(())
}
