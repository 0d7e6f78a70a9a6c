//! Machines that are to be managed from outside, and how one is attached to.
//!
//! Enters: names, and rules for those that nobody has named. Leaves: back ends of those that are there, and of each other, once, why not. A machine that went is waited for
//! again. What must never happen: one that does not answer keeping those from their decisions that are there; so [`open`] can
//! be called on any thread, and only [`Opened`] machines come to the loop.
use crate::backend::balloon::{Balloon, of_interface};
use crate::backend::{Attached, Backend, Kind, why_counted_only};
use crate::config::{Config, MachineConfig};
use crate::control::Control;
use crate::traits::traits_of;
use plimsoll_attach::vmm::Vmm;
use plimsoll_attach::{
    AttachLock, Discovery, Follower, Held, Identity, NoInterface, Request, Sighting, find, join,
};
use plimsoll_linux::explain;
use plimsoll_policy::admission::AdmissionError;
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::StartTime;
use plimsoll_types::{ByteCount, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often is looked for machines that are not there yet: finding one reads all of /proc.
const FIND_EVERY: Duration = Duration::from_secs(5);
/// Machines that rules bring are attached to so many a turn: walking page tables takes milliseconds each, asking libvirt more.
const OPENED_MAX: usize = 4;
/// The longest pause before one that could not be attached to is tried again.
const PAUSE_MAX: Duration = Duration::from_secs(80);

/// What is said about the machine of a name. A machine has the name it is looked for by, and its own.
pub type Said<'a> = dyn Fn(&str) -> Option<MachineConfig> + 'a;

/// What a rule says about a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruled {
    /// Which rule.
    pub rule: String,
    /// What it says.
    pub config: MachineConfig,
}

impl Ruled {
    /// What the first rule says for a machine that nobody has named, if it says that it is to be managed.
    pub fn of(config: &Config, process: ProcessId, vmm: Vmm, name: &str) -> Option<Self> {
        // Looking costs something.
        if config.rules.is_empty() {
            return None;
        }
        let rule = config.rule(&traits_of(process, vmm, name))?;
        Some(Self { rule: rule.to_string(), config: rule.config.clone()? })
    }
}

/// What a rule says about a machine that was seen and is to be managed.
pub type Rules<'a> = dyn Fn(&Sighting) -> Option<Ruled> + 'a;

/// A machine that a rule is for and that could not be attached to.
#[derive(Debug)]
struct Stranger {
    start: StartTime,
    why: String,
    again_at: Instant,
    pause: Duration,
}

/// A machine that is attached to and not in the loop yet.
pub struct Opened {
    /// Its name.
    pub name: String,
    /// The RAM its guest owns.
    pub size: ByteCount,
    /// Whoever takes pages of it.
    pub backend: Box<dyn Backend>,
    /// What is said about it.
    pub config: MachineConfig,
    /// What its operator should hear.
    pub notes: Vec<String>,
}

impl Opened {
    /// Has the loop take it in.
    ///
    /// # Errors
    /// When the host cannot keep its word to all.
    pub fn admit(self, control: &mut Control) -> Result<MachineId, AdmissionError> {
        control.admit(&self.name, self.config.settings(MachineId(0), self.size), self.backend)
    }
}

/// Machines that are to be managed.
#[derive(Debug)]
pub struct Roster {
    /// Those that are not, with what was last said of them.
    waiting: BTreeMap<String, Option<String>>,
    /// Those that are.
    managed: BTreeMap<MachineId, String>,
    /// When is looked for them again.
    find_at: Instant,
    /// What was seen last.
    seen: Discovery,
    /// What rules say about machines of the loop.
    ruled: BTreeMap<MachineId, Ruled>,
    strangers: BTreeMap<ProcessId, Stranger>,
}

impl Roster {
    /// Those of these names, UUIDs or process ids.
    pub fn new(wanted: impl IntoIterator<Item = String>) -> Self {
        let waiting = wanted.into_iter().map(|name| (name, None)).collect();
        Self {
            waiting,
            managed: BTreeMap::new(),
            find_at: Instant::now(),
            seen: Discovery::default(),
            ruled: BTreeMap::new(),
            strangers: BTreeMap::new(),
        }
    }

    /// Those that are not there, each with why not.
    pub fn waiting(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.waiting.iter().map(|(name, why)| (&**name, why.as_deref()))
    }

    /// Machines that a rule speaks for, and which one.
    pub(crate) fn rules(&self) -> impl Iterator<Item = (MachineId, &str)> {
        self.ruled.iter().map(|(id, ruled)| (*id, &*ruled.rule))
    }

    /// What a rule says about a machine of the loop.
    pub fn ruled(&self, id: MachineId) -> Option<&Ruled> {
        self.ruled.get(&id)
    }

    /// A rule speaks for a machine of the loop, or none does any more.
    pub fn rule(&mut self, id: MachineId, ruled: Option<Ruled>) {
        match ruled {
            Some(ruled) => drop(self.ruled.insert(id, ruled)),
            None => drop(self.ruled.remove(&id)),
        }
    }

    /// What was last seen of a process.
    pub fn sighting(&self, process: ProcessId) -> Option<&Sighting> {
        self.seen.machines.iter().find(|machine| machine.identity.process == process)
    }

    /// One more is managed from now on, and waited for when it goes.
    pub fn add(&mut self, id: MachineId, name: String) {
        self.waiting.remove(&name);
        self.managed.insert(id, name);
    }

    /// These are to be managed from now on, and looked for at once. Those that are managed and not among them are forgotten.
    pub fn want(&mut self, wanted: &BTreeSet<String>, now: Instant) {
        self.managed.retain(|_, name| wanted.contains(name));
        let here: BTreeSet<&String> = self.managed.values().collect();
        let mut told = std::mem::take(&mut self.waiting);
        let waiting = wanted.iter().filter(|name| !here.contains(name));
        self.waiting = waiting.map(|name| (name.clone(), told.remove(name).flatten())).collect();
        self.find_at = now;
    }

    /// The name by which a machine was looked for.
    pub fn wanted(&self, id: MachineId) -> Option<&str> {
        self.managed.get(&id).map(String::as_str)
    }

    /// A machine is not waited for any more, by whatever name it was.
    pub fn strike(&mut self, id: MachineId, name: &str) {
        self.managed.remove(&id);
        self.ruled.remove(&id);
        self.waiting.remove(name);
    }

    /// Nobody of that name is waited for any more.
    pub fn forget(&mut self, name: &str) {
        self.waiting.remove(name);
    }

    /// Takes in whoever is there, if it is time to look again, and returns those that came, with their names. `note` hears of each of
    /// them, and once of each other why it did not. Those that are waited for come before those that only `rules` know.
    pub fn take_in(
        &mut self,
        control: &mut Control,
        now: Instant,
        said: &Said<'_>,
        rules: Option<&Rules<'_>>,
        note: &mut dyn FnMut(&str),
    ) -> Vec<(MachineId, String)> {
        let mut came = Vec::new();
        if now < self.find_at {
            return came;
        }
        self.find_at = now + FIND_EVERY;
        let here: BTreeSet<MachineId> = control.names().map(|(id, _)| id).collect();
        self.ruled.retain(|id, _| here.contains(id));
        let gone = self.managed.extract_if(.., |id, _| !here.contains(id)).map(|(_, name)| (name, None));
        self.waiting.extend(gone);
        if rules.is_none() && self.waiting.is_empty() {
            return came;
        }
        // They have handed themselves over, and are as they are to be.
        let own = control.berths().into_values().filter(|berth| berth.kind == Kind::HandedOver);
        let own: BTreeSet<String> = own.map(|berth| berth.name).collect();
        if rules.is_none() && self.waiting.keys().all(|wanted| own.contains(wanted)) {
            return came;
        }
        // All of /proc is read once for all, not once for each, between two decisions.
        let seen = self.seen.again();
        self.waiting.retain(|wanted, told| {
            if own.contains(wanted) {
                return true;
            }
            // Where that failed, it says so of each.
            let found = seen.as_ref().map_or_else(|_| find(wanted), |seen| seen.find(wanted));
            let opened = found
                .map_err(|refusal| explain(&refusal))
                .and_then(|found| open(found.identity, |name| said(wanted).or_else(|| said(name))))
                .and_then(|opened| welcome(opened, control, None, note));
            match opened {
                Ok((id, name)) => {
                    self.managed.insert(id, wanted.clone());
                    came.push((id, name));
                    return false;
                }
                Err(why) if told.as_ref() == Some(&why) => {}
                Err(why) => {
                    note(&format!("{wanted} is not managed: {why}"));
                    *told = Some(why);
                }
            }
            true
        });
        self.seen = seen.unwrap_or_default();
        if let Some(rules) = rules {
            came.extend(self.take_in_strangers(control, now, rules, note));
        }
        came
    }

    /// Takes in those that nobody has named and a rule is for, a few at a time: each may take as long as its VMM likes.
    fn take_in_strangers(
        &mut self,
        control: &mut Control,
        now: Instant,
        rules: &Rules<'_>,
        note: &mut dyn FnMut(&str),
    ) -> Vec<(MachineId, String)> {
        let (mut came, mut opened) = (Vec::new(), 0);
        let mut names: BTreeSet<String> = control.names().map(|(_, name)| name.to_owned()).collect();
        let managed: BTreeSet<ProcessId> =
            control.berths().into_values().filter_map(|berth| berth.process).collect();
        let seen = &self.seen.machines;
        self.strangers.retain(|process, stranger| {
            let is_it =
                |one: &Sighting| one.identity.process == *process && one.identity.start == stranger.start;
            seen.iter().any(is_it)
        });
        for sighting in seen {
            let process = sighting.identity.process;
            let is_early = self.strangers.get(&process).is_some_and(|stranger| now < stranger.again_at);
            // A machine of plimsoll's own hands itself over.
            if managed.contains(&process) || is_early || sighting.vmm == Vmm::Plimsoll {
                continue;
            }
            let Some(ruled) = rules(sighting) else { continue };
            if opened == OPENED_MAX {
                // The others in the next turn.
                self.find_at = now;
                break;
            }
            opened += 1;
            let taken = if names.contains(&sighting.name) {
                Err(format!("a machine called {} is managed already", sighting.name))
            } else {
                open(sighting.identity, |_| Some(ruled.config.clone()))
                    .and_then(|opened| welcome(opened, control, Some(&ruled.rule), note))
            };
            match taken {
                Ok((id, name)) => {
                    self.strangers.remove(&process);
                    self.ruled.insert(id, ruled);
                    names.insert(name.clone());
                    came.push((id, name));
                }
                Err(why) => {
                    let before = self.strangers.get(&process);
                    if before.is_none_or(|stranger| stranger.why != why) {
                        let (name, rule, process) = (&sighting.name, &ruled.rule, process.get());
                        note(&format!(
                            "{name}, process {process}, is not managed, as {rule} says it should be: {why}"
                        ));
                    }
                    let pause = before.map_or(FIND_EVERY, |stranger| (stranger.pause * 2).min(PAUSE_MAX));
                    let (start, again_at) = (sighting.identity.start, now + pause);
                    self.strangers.insert(process, Stranger { start, why, again_at, pause });
                }
            }
        }
        came
    }
}

/// Has the loop take in a machine that was attached to, and tells of it.
fn welcome(
    opened: Opened,
    control: &mut Control,
    rule: Option<&str>,
    note: &mut dyn FnMut(&str),
) -> Result<(MachineId, String), String> {
    let (name, size, notes) = (opened.name.clone(), opened.size, opened.notes.clone());
    let process = opened.backend.process();
    let id = opened.admit(control).map_err(|error| explain(&error))?;
    notes.iter().for_each(|text| note(text));
    let process = process.map_or(0, ProcessId::get);
    let by = rule.map(|rule| format!(" by {rule}")).unwrap_or_default();
    note(&format!("{name} is managed{by}: {size}, process {process}"));
    Ok((id, name))
}

/// Attaches to a machine; `said` tells what is said about the machine of its name.
///
/// # Errors
/// Why it cannot be attached to, in words.
pub fn open(identity: Identity, said: impl Fn(&str) -> Option<MachineConfig>) -> Result<Opened, String> {
    let held = Held::reopen(identity.process, identity.start).map_err(|refusal| explain(&refusal))?;
    let lock = Arc::new(AttachLock::acquire(&held).map_err(|refusal| explain(&refusal))?);
    // The monitor serves one client, which is the balloon's thread: it also tells of migrations.
    let follower = Follower::new(held, Request::default()).map_err(|refusal| explain(&refusal))?;
    let dossier = follower.dossier();
    let (name, size) = (dossier.name.clone(), dossier.size());
    let config = said(&name).unwrap_or_default();
    let request = Request { qmp: config.qmp.clone(), api: config.api.clone(), ..Request::default() };
    let mut notes = Vec::new();
    let balloon = balloon(&follower, &request, &lock).unwrap_or_else(|why| {
        notes.push(format!("{name} is managed without its balloon: {why}"));
        None
    });
    if let Some(why) = why_counted_only(dossier) {
        notes.push(format!("{name} is counted, and no page is taken from it: {why}"));
    }
    let backend = Box::new(Attached::new(follower, lock, balloon, Instant::now())?);
    Ok(Opened { name, size, backend, config, notes })
}

/// The machine's balloon, where somebody may be asked about it. That nobody may is no news.
fn balloon(
    follower: &Follower,
    request: &Request,
    lock: &Arc<AttachLock>,
) -> Result<Option<Balloon>, String> {
    let control = match join(follower.held(), follower.dossier(), request) {
        Ok(control) => control,
        Err(
            NoInterface::MonitorNotOffered(_)
            | NoInterface::NoMonitor
            | NoInterface::NoApi(_)
            | NoInterface::NotSpoken(_),
        ) => return Ok(None),
        Err(error) => return Err(explain(&error)),
    };
    let Some(interface) = of_interface(control).map_err(|error| explain(&error))? else { return Ok(None) };
    let balloon = Balloon::start(interface, follower.held().process(), Arc::clone(lock));
    balloon.map(Some).map_err(|error| explain(&error))
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("name", &self.name).field("size", &self.size).finish_non_exhaustive()
    }
}
