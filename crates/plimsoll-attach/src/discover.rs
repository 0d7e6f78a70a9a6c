//! All machines of a host: /proc enters, a list of sightings leaves. Only programs and arguments are read, nothing is
//! asked and no page table walked, so that looking costs little and disturbs nobody.
//!
//! Who looks again and again brings what was seen last: a machine that was seen is known by its process and start time, and of any other
//! process only the name of its program is read. A VMM that executes another program under the same number is seen as what it was.

use crate::Refusal;
use crate::argv::Options;
use crate::dossier::Identity;
use crate::held::Held;
use crate::inspect::{fallback_name, recognise};
use crate::vmm::{self, ControlSocket, Vmm};
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::{ProcfsError, program};
use serde::Serialize;
use std::path::Path;

/// A machine that was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sighting {
    /// Which process.
    #[serde(flatten)]
    pub identity: Identity,
    /// What kind.
    pub vmm: Vmm,
    /// Its name: as given, or made of kind and process id.
    pub name: String,
    /// Its UUID, if the command line says it.
    pub uuid: Option<String>,
    /// Where it listens.
    pub sockets: Vec<ControlSocket>,
}

/// What a look around found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Discovery {
    /// The machines, by process id.
    pub machines: Vec<Sighting>,
    /// Processes that call themselves a VMM and may not be looked at: it takes CAP_SYS_PTRACE, or their user.
    pub unreadable: usize,
}

/// Looks at all processes.
pub fn discover() -> Result<Discovery, Refusal> {
    Discovery::default().again()
}

/// Looks at all processes; of machines that are in `before` only whether they are still there.
fn discover_since(before: &Discovery) -> Result<Discovery, Refusal> {
    let mut found = Discovery::default();
    for entry in std::fs::read_dir("/proc").map_err(Refusal::Listing)? {
        let name = entry.map_err(Refusal::Listing)?.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok());
        let Some(process) = number.and_then(ProcessId::new) else { continue };
        match program::executable(process) {
            Err(ProcfsError::NotPermitted { .. }) if claims_to_be_vmm(process) => found.unreadable += 1,
            // It may end at any time, have another verb, or turn out to be a part of another machine.
            Ok(path) if vmm::is_named_like_one(&path) => {
                let known = before.known(process).cloned();
                found.machines.extend(known.or_else(|| sight(process).ok()));
            }
            _ => {}
        }
    }
    found.machines.sort_by_key(|machine| machine.identity.process);
    Ok(found)
}

/// The machine of that name or UUID, or where none is called so, of that process id.
pub fn find(wanted: &str) -> Result<Sighting, Refusal> {
    // That of a process can be had where others cannot be looked for.
    let found = discover().and_then(|seen| choose(wanted, &seen.machines));
    found.or_else(|refusal| otherwise(wanted, refusal))
}

impl Discovery {
    /// Looks at all processes again.
    pub fn again(&self) -> Result<Self, Refusal> {
        discover_since(self)
    }

    /// The machine of a process, if it is still the one that was seen.
    fn known(&self, process: ProcessId) -> Option<&Sighting> {
        let place = self.machines.binary_search_by_key(&process, |machine| machine.identity.process).ok()?;
        let machine = self.machines.get(place)?;
        (program::stat(process).ok()?.start == machine.identity.start).then_some(machine)
    }

    /// The machine of that name or UUID among those that were found, or, whether or not it was, that process id.
    pub fn find(&self, wanted: &str) -> Result<Sighting, Refusal> {
        choose(wanted, &self.machines).or_else(|refusal| otherwise(wanted, refusal))
    }
}

/// The machine of that process, if a process is named, where none has that name. Numbers are names, too.
fn otherwise(wanted: &str, refusal: Refusal) -> Result<Sighting, Refusal> {
    match wanted.parse() {
        Ok(number) if !matches!(refusal, Refusal::SharedName { .. }) => {
            ProcessId::new(number).ok_or(Refusal::NoProcess(number)).and_then(sight)
        }
        _ => Err(refusal),
    }
}

fn choose(wanted: &str, machines: &[Sighting]) -> Result<Sighting, Refusal> {
    let is_wanted = |machine: &&Sighting| machine.name == wanted || machine.uuid.as_deref() == Some(wanted);
    let (mut matching, others): (Vec<_>, Vec<_>) = machines.iter().partition(is_wanted);
    match (matching.pop(), matching.is_empty()) {
        (Some(only), true) => Ok(only.clone()),
        (Some(last), false) => {
            let shown = matching
                .iter()
                .chain([&last])
                .map(|machine| format!("{} ({})", machine.identity.process, machine.vmm));
            Err(Refusal::SharedName {
                name: wanted.to_owned(),
                candidates: shown.collect::<Vec<_>>().join(", "),
            })
        }
        (None, _) => {
            let names: Vec<&str> = others.iter().map(|machine| machine.name.as_str()).collect();
            let known = if names.is_empty() { "no machines here".to_owned() } else { names.join(", ") };
            Err(Refusal::NoSuchName { name: wanted.to_owned(), known })
        }
    }
}

/// Looks at one process's command line.
fn sight(process: ProcessId) -> Result<Sighting, Refusal> {
    // Said before what it runs is looked at: that this is no virtual machine would be no help.
    if process == ProcessId::own() {
        return Err(Refusal::Ourselves(process));
    }
    let held = Held::open(process)?;
    let program = held.program()?;
    let kind = recognise(&held, &program)?;
    let claim = (kind.claim)(&Options::new(&program.argv));
    held.confirm()?;
    Ok(Sighting {
        identity: Identity { process, start: held.start() },
        vmm: kind.vmm,
        name: claim.name.unwrap_or_else(|| fallback_name(kind.vmm, process)),
        uuid: claim.uuid,
        sockets: claim.sockets,
    })
}

/// What a process calls itself is all that others may read.
fn claims_to_be_vmm(process: ProcessId) -> bool {
    let argv = program::arguments(process).unwrap_or_default();
    argv.first().is_some_and(|name| vmm::recognise(Path::new(name), &argv).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::procfs::StartTime;

    fn machine(number: u32, name: &str) -> Sighting {
        Sighting {
            identity: Identity { process: ProcessId::new(number).unwrap(), start: StartTime(1) },
            vmm: Vmm::Qemu,
            name: name.to_owned(),
            uuid: Some(format!("uuid-{number}")),
            sockets: Vec::new(),
        }
    }

    #[test]
    fn a_name_that_several_machines_have_lists_them() {
        let machines = || vec![machine(1, "web"), machine(2, "db"), machine(3, "web")];
        assert_eq!(choose("db", &machines()).unwrap().identity.process.get(), 2);
        assert_eq!(choose("uuid-3", &machines()).unwrap().identity.process.get(), 3);
        let text = choose("web", &machines()).unwrap_err().to_string();
        assert_eq!(
            text,
            "several machines are called \"web\": pid 1 (QEMU), pid 3 (QEMU); give the process id"
        );
        let text = choose("mail", &machines()).unwrap_err().to_string();
        assert_eq!(text, "no machine is called \"mail\"; there are web, db, web");
        assert!(choose("mail", &[]).unwrap_err().to_string().ends_with("there are no machines here"));
    }

    #[test]
    fn a_number_is_a_name_before_it_is_a_process_id() {
        let own = ProcessId::own().get();
        let named = |machines| Discovery { machines, ..Discovery::default() };
        let found = named(vec![machine(7, &own.to_string()), machine(8, "web")]).find(&own.to_string());
        assert_eq!(found.unwrap().identity.process.get(), 7);
        let found = named(vec![machine(8, "web")]).find(&own.to_string());
        assert!(matches!(found, Err(Refusal::Ourselves(_))), "{found:?}");
        let found = named(vec![machine(7, "5"), machine(8, "5")]).find("5");
        assert!(matches!(found, Err(Refusal::SharedName { .. })), "{found:?}");
    }
}
