//! `nanite demo`: a complete system in this process, to look at. It needs no broker and leaves nothing behind.
//!
//! `system` starts the nodes, `scenes` uses and attacks them, `report` holds the results and prints them.

mod report;
mod scenes;
mod system;

use std::time::Instant;

use super::error::{CliError, Exit};
use super::{output, runtime};
use report::{Rates, Report, millis};
use system::{Pki, SHOUT, System, TEXT};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print one JSON object with all results.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let report = runtime::run(demonstrate(!self.json))?;
        if self.json {
            output::json(&report)?;
        }
        Ok(if report.ok { Exit::Success } else { Exit::Failure })
    }
}

/// Plays all scenes, and prints each if `visible`. Unexpected results are in the report; an error means that it could not go on.
async fn demonstrate(visible: bool) -> Result<Report, CliError> {
    let print = |lines: Vec<String>| if visible { output::line(&lines.join("\n")) } else { Ok(()) };
    let start = Instant::now();
    let mut report = Report::default();
    print(report::title())?;

    let pki = Pki::create()?;
    report.certificates = pki.certificates(start);
    print(report.certificates.lines())?;

    let started = Instant::now();
    let (secure, plain) = (System::secure(&pki).await?, System::plain(&pki).await?);
    report.agents = scenes::agents(&secure).await?;
    print(report.agent_lines(millis(started)))?;

    let (results, plain_results) = (scenes::requests(&secure).await?, scenes::requests(&plain).await?);
    (report.requests, report.parts, report.failures) = (results.requests, results.parts, results.failures);
    report.broker = scenes::search(&results.messages, &plain_results.messages);
    print(report.request_lines(&format!("{SHOUT} \"{TEXT}\"")))?;
    print(report.parts_and_failure_lines())?;
    print(report.broker.lines())?;

    report.refusals = scenes::attacks(&pki, &secure, &results.messages).await?;
    print(report.refusal_lines())?;

    print(report::rates_heading(&scenes::IN_FLIGHT))?;
    for (system, of) in [(&secure, "secure"), (&plain, "plain")] {
        let rates = Rates { of, at: scenes::rates(system).await? };
        print(rates.lines())?;
        report.rates.push(rates);
    }
    report.finish(start);
    print(report.summary())?;
    Ok(report)
}
