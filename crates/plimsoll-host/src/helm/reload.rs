//! The settings file read again while the loop runs.
//!
//! Enters: a file that makes sense by itself. Leaves: the loop where a new manager would come to with that file and with what was said
//! by the API, or as it was. What must never happen: a part of the file in force. So all settings are made first, tried as one, and
//! only then is anything else changed, none of which can fail.
use super::{Groups, Helm, contradiction, said, size_of, wanted};
use crate::api::{Code, Fault};
use crate::backend::Kind;
use crate::config::{Config, MachineConfig};
use crate::control::{Control, SettleError};
use crate::roster::Ruled;
use plimsoll_attach::vmm::Vmm;
use plimsoll_policy::settings::Settings;
use plimsoll_types::MachineId;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

/// Who speaks for a machine of the loop.
enum Voice {
    /// The table of that name, or the API that had it attached to by that name.
    Named(String),
    /// A rule.
    Rule(Ruled),
    /// Nobody, but it is there: its VMM handed it over, or it came before names and rules did.
    Nobody,
}

impl Helm {
    /// Puts what a file says in force.
    ///
    /// # Errors
    /// Why the host cannot do that. Nothing was changed then.
    pub(super) fn reload(&mut self, control: &mut Control, config: Config) -> Result<(), Fault> {
        let config = config.numbered_as(&self.config);
        let groups: Groups = config.groups.clone();
        let wanted = wanted(&config, &self.kept);
        let (mut staying, mut leaving) = (Vec::new(), Vec::new());
        for (id, name) in control.names() {
            match self.voice(control, id, name, &config, &wanted) {
                Some(voice) => staying.push((id, name.to_owned(), voice)),
                None => leaving.push(name.to_owned()),
            }
        }
        let settings = |(id, name, voice): &(MachineId, String, Voice)| {
            let of_file = match voice {
                Voice::Rule(ruled) => ruled.config.clone(),
                Voice::Named(other) if !config.machines.contains_key(name) => config.machine(other),
                Voice::Named(_) | Voice::Nobody => config.machine(name),
            };
            said(&self.kept, of_file, &groups, name).settings(*id, size_of(control, *id))
        };
        let machines = staying.iter().map(settings).collect();
        // The newest word of a person comes before the file's.
        let before = control.tree().settings().capacity;
        let is_said = self.kept.words().budget_bytes.is_some();
        let capacity = config.budget.filter(|_| !is_said).unwrap_or(before);
        if capacity != before {
            self.set_budget(control, capacity)?;
        }
        let settled = control.settle(Settings { machines, ..config.settings(capacity) });
        settled.map_err(|error| {
            if capacity != before {
                let _ = self.set_budget(control, before);
            }
            match error {
                SettleError::Settings(error) => contradiction(control, &groups, &error),
                error @ SettleError::NoRoom { .. } => Fault::new(Code::Conflict, error.to_string()),
            }
        })?;
        for name in leaving {
            (self.note)(&format!("{name} is let go: the settings name it no more"));
        }
        self.roster.want(&wanted, Instant::now());
        for (id, name, voice) in staying {
            let is_said = self.kept.word(&name).is_some_and(|word| word.settings.is_some());
            let of = |config: &Config| -> Option<MachineConfig> { config.machines.get(&name).cloned() };
            if is_said && of(&config) != of(&self.config) {
                (self.note)(&format!(
                    "{name} keeps what was said by the API, which comes before the settings"
                ));
            }
            let ruled = match voice {
                Voice::Rule(ruled) => Some(ruled),
                Voice::Named(wanted) => {
                    self.roster.add(id, wanted);
                    None
                }
                Voice::Nobody => None,
            };
            self.roster.rule(id, ruled);
        }
        self.own.iter().for_each(|own| own.heed(&config));
        self.groups = Arc::new(groups);
        self.config = config;
        Ok(())
    }

    /// Who will speak for a machine; nothing if it is to be let go, since whoever spoke for it does no more.
    fn voice(
        &self,
        control: &Control,
        id: MachineId,
        name: &str,
        config: &Config,
        wanted: &BTreeSet<String>,
    ) -> Option<Voice> {
        let berth = control.berth(id)?;
        let sighting = berth.process.and_then(|process| self.roster.sighting(process));
        let is_attached = berth.kind == Kind::Attached;
        let by_uuid = sighting.and_then(|seen| seen.uuid.as_deref());
        let names = [self.roster.wanted(id), Some(name), by_uuid];
        // Of a machine that its VMM handed over nobody has to say that it is managed.
        if let Some(found) =
            names.into_iter().flatten().find(|name| wanted.contains(*name)).filter(|_| is_attached)
        {
            return Some(Voice::Named(found.to_owned()));
        }
        let vmm = if is_attached { sighting.map(|seen| seen.vmm) } else { Some(Vmm::Plimsoll) };
        let ruled = berth.process.zip(vmm).and_then(|(process, vmm)| Ruled::of(config, process, vmm, name));
        let had_a_voice = self.roster.wanted(id).is_some() || self.roster.ruled(id).is_some();
        match ruled {
            Some(ruled) => Some(Voice::Rule(ruled)),
            None if is_attached && had_a_voice => None,
            None => Some(Voice::Nobody),
        }
    }
}
