//! `plimsoll host check`: findings as text or JSON.
use super::say;
use plimsoll_linux::prepare::{Check, Finding, Own, State, check};
use plimsoll_linux::system::Linux;
use plimsoll_vmm::probe::Accel;
use serde::Serialize;
use std::process::ExitCode;

/// The form of the JSON; a field that changes its meaning raises it.
const VERSION: u32 = 1;

#[derive(clap::Args)]
pub(super) struct CheckArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    can_attach: bool,
    #[serde(flatten)]
    check: &'a Check,
}

pub(super) fn run(args: &CheckArgs) -> Result<ExitCode, String> {
    let accel = plimsoll_vmm::probe();
    let kvm = match &accel {
        Accel::Kvm { .. } => Ok(accel.to_string()),
        Accel::InProcess { because } => Err(because.clone()),
    };
    let check = check(&Linux, &Own::probe(kvm));
    let can_attach = check.obstacle.is_none();
    if args.json {
        let report = Report { version: VERSION, can_attach, check: &check };
        say(&serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?);
    } else {
        say(&text(&check));
    }
    Ok(if can_attach { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(check: &Check) -> String {
    let findings: String = check.findings.iter().map(line).collect();
    let verdict = match &check.obstacle {
        None => "machines can be attached with kernel paging".to_owned(),
        Some(obstacle) => format!(
            "machines cannot be attached with kernel paging: {}\nto change that: {}",
            obstacle.because, obstacle.fix
        ),
    };
    format!("{findings}\n{verdict}")
}

/// Two lines: what there is; what it is for, and what to do.
fn line(finding: &Finding) -> String {
    let state = match finding.state {
        State::Present => "present",
        State::Limited => "limited",
        State::Absent => "absent",
    };
    let Finding { name, found, used_for, .. } = finding;
    let remedy =
        finding.remedy.as_ref().map(|remedy| format!("; for all of it: {remedy}")).unwrap_or_default();
    format!("{name:16} {state:8} {found}\n{:25} used for {used_for}{remedy}\n", "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_linux::prepare::Obstacle;

    #[test]
    fn a_finding_has_what_there_is_what_it_is_for_and_what_to_do() {
        let swap = Finding {
            name: "swap",
            state: State::Absent,
            found: "none".to_owned(),
            used_for: "keeping what is paged out",
            remedy: Some("plimsoll host prepare".to_owned()),
        };
        let memory = Finding {
            name: "memory",
            state: State::Present,
            found: "MemTotal 8G".to_owned(),
            used_for: "what there is to manage",
            remedy: None,
        };
        let obstacle =
            Obstacle { because: "this host has no swap".to_owned(), fix: "plimsoll host prepare".to_owned() };
        let mut check = Check { obstacle: Some(obstacle), findings: vec![swap, memory] };
        let findings = "\
swap             absent   none
                          used for keeping what is paged out; for all of it: plimsoll host prepare
memory           present  MemTotal 8G
                          used for what there is to manage

";
        let cannot = "machines cannot be attached with kernel paging: this host has no swap\nto change that: plimsoll host prepare";
        assert_eq!(text(&check), format!("{findings}{cannot}"));
        check.obstacle = None;
        assert_eq!(text(&check), format!("{findings}machines can be attached with kernel paging"));
    }
}
