//! The settings file read again while the loop runs.
//!
//! Enters: a file that makes sense by itself. Leaves: the loop where a new manager would come to with that file and with what was said
//! by the API, or as it was. What must never happen: a part of the file in force. So all settings are made first, tried as one, and
//! only then is anything else changed, none of which can fail.
use super::{Groups, Helm, contradiction, said, size_of, wanted};
use crate::api::{Code, Fault};
use crate::backend::Kind;
use crate::config::Config;
use crate::control::{Control, SettleError};
use plimsoll_policy::settings::{MachineSettings, Settings};
use plimsoll_types::MachineId;
use std::sync::Arc;
use std::time::Instant;

impl Helm {
    /// Puts what a file says in force.
    ///
    /// # Errors
    /// Why the host cannot do that. Nothing was changed then.
    pub(super) fn reload(&mut self, control: &mut Control, config: Config) -> Result<(), Fault> {
        let config = config.numbered_as(&self.config);
        let groups: Groups = config.groups.clone();
        let wanted = wanted(&config, &self.kept);
        let is_over = |id: MachineId| self.roster.wanted(id).is_some_and(|name| !wanted.contains(name));
        let (leaving, staying): (Vec<_>, Vec<_>) =
            control.names().map(|(id, name)| (id, name.to_owned())).partition(|(id, _)| {
                is_over(*id) && control.berth(*id).is_some_and(|it| it.kind == Kind::Attached)
            });
        let settings = |(id, name): &(MachineId, String)| -> MachineSettings {
            said(&self.kept, &config, &groups, name).settings(*id, size_of(control, *id))
        };
        let machines = staying.iter().map(settings).collect();
        let capacity = control.tree().settings().capacity;
        let all = Settings { machines, ..config.settings(capacity) };
        control.settle(all).map_err(|error| match error {
            SettleError::Settings(error) => contradiction(control, &groups, &error),
            error @ SettleError::NoRoom { .. } => Fault::new(Code::Conflict, error.to_string()),
        })?;
        for (_, name) in &leaving {
            (self.note)(&format!("{name} is let go: the settings name it no more"));
        }
        for (_, name) in &staying {
            let is_said = self.kept.word(name).is_some_and(|word| word.settings.is_some());
            if is_said && config.machines.get(name) != self.config.machines.get(name) {
                (self.note)(&format!(
                    "{name} keeps what was said by the API, which comes before the settings"
                ));
            }
        }
        self.roster.want(&wanted, Instant::now());
        self.groups = Arc::new(groups);
        self.config = config;
        Ok(())
    }
}
