//! A daemon's control loop: both kinds of machines, and whatever an operator says while it runs.
//!
//! Enters: machines that were handed over, names of those that are to be attached to, [`Order`]s. Leaves: decisions that are
//! carried out, and a [`Moment`] after each. What must never happen: an order that is half in force. So an order is tried on the
//! loop, then kept for the next manager ([`kept`]), and taken back where it cannot be kept; and it is answered after the
//! decision that follows it, so that whoever asked finds it in what is shown next.
//!
//! Machines under our own pager are found by looking, once a turn: they come and go without this thread, which may be late, or
//! not there at all, and no guest waits for it.
pub mod kept;
mod reload;

use crate::api::exchange::{Asked, Desk, Moment, ORDERS_MAX, Obeyed, Order};
use crate::api::{Code, Fault, Settings};
use crate::backend::balloon::Farewell;
use crate::backend::{Backend, Done, Kind, Managed, Trouble};
use crate::config::{Config, MachineConfig, group_name};
use crate::control::{Control, Event, Happened, RunError, Stirred, Turn, Wakers, run};
use crate::roster::{Opened, Roster, Ruled, Rules};
use crate::stores::Stores;
use kept::{Kept, KeptError, Word, Words};
use parking_lot::Mutex;
use plimsoll_attach::Sighting;
use plimsoll_attach::vmm::Vmm;
use plimsoll_core::ledger::{Budget, Kind as LedgerKind};
use plimsoll_linux::explain;
use plimsoll_linux::uffd::manager::Manager;
use plimsoll_policy::admission::AdmissionError;
use plimsoll_policy::settings::{GroupSettings, Owner, SettingsError};
use plimsoll_policy::tree::Tree;
use plimsoll_sys::psi::PressureTrigger;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// Below this a daemon could not even run one machine.
pub const BUDGET_MIN: ByteCount = ByteCount::mib(32);

/// Machines under our own pager, and what they share with the others.
pub struct Own {
    /// Who pages them.
    pub manager: Arc<Mutex<Manager>>,
    /// What machines of both kinds, their VMMs and the daemon may use.
    pub budget: Arc<Mutex<ByteCount>>,
    /// What was last seen of machines managed from outside.
    pub attached: Arc<AtomicU64>,
    /// Machines that were met, by the manager's names.
    met: BTreeSet<MachineId>,
    /// What each of the others was last seen to use: one that cannot be looked at just now is no room.
    seen: BTreeMap<MachineId, ByteCount>,
}

impl Own {
    /// Those of a manager.
    pub fn new(manager: Arc<Mutex<Manager>>, budget: Arc<Mutex<ByteCount>>) -> Self {
        Self { manager, budget, attached: Arc::default(), met: BTreeSet::new(), seen: BTreeMap::new() }
    }

    /// Holds pagers to what the settings say of them all.
    fn heed(&self, config: &Config) {
        self.manager.lock().host().limit_storing(config.storing_share.0);
    }
}

/// Who hears what an operator should.
pub type Note = Box<dyn FnMut(&str) + Send>;

/// A control loop that takes orders.
pub struct Helm {
    desk: Desk,
    config: Config,
    groups: Arc<Groups>,
    kept: Kept,
    roster: Roster,
    own: Option<Own>,
    note: Note,
    tree: Option<Arc<Tree>>,
    /// Orders that were carried out, until it has been decided about what they changed; and what else their answers wait for.
    obeyed: Vec<(oneshot::Sender<Obeyed>, Obeyed, Option<Farewell>)>,
    /// That of the order that is being carried out.
    farewell: Option<Farewell>,
}

impl Helm {
    /// Goes on where `kept` says that an earlier one was.
    pub fn new(config: Config, kept: Kept, own: Option<Own>, desk: Desk, note: Note) -> Self {
        own.iter().for_each(|own| own.heed(&config));
        let groups = Arc::new(config.groups.clone());
        let (roster, tree) = (Roster::new(wanted(&config, &kept)), None);
        Self { desk, config, groups, kept, roster, own, note, tree, obeyed: Vec::new(), farewell: None }
    }

    /// Runs until `end` is readable. `pressure` is the kernel's word that tasks wait for memory.
    ///
    /// # Errors
    /// When it cannot wait, which is a bug.
    pub fn run(
        mut self,
        mut control: Control,
        end: Option<BorrowedFd<'_>>,
        pressure: Option<&PressureTrigger>,
    ) -> Result<(), RunError> {
        if let Some(bytes) = self.kept.words().budget_bytes
            && let Err(fault) = self.set_budget(&mut control, ByteCount(bytes))
        {
            (self.note)(&format!("the budget that was said is not in force: {fault}"));
        }
        let asked = self.desk.asked();
        // Without one it looks more often.
        let stirred =
            self.own.as_ref().and_then(|own| Stirred::of(Arc::clone(own.manager.lock().host())).ok());
        let wakers = Wakers { end, pressure, asked: Some(&asked), stirred: stirred.as_ref() };
        self.look_round(&mut control);
        run(&mut control, wakers, |control, happened| {
            match happened {
                Happened::Turn(turn) => {
                    self.show(control, turn);
                    self.look_round(control);
                }
                Happened::Asked => {
                    // Whoever is refused may ask again at once, and decisions are due.
                    for _ in 0..ORDERS_MAX {
                        let Some(Asked { order, answer, .. }) = self.desk.next() else { break };
                        match self.obey(control, order) {
                            // Nothing was changed, so there is nothing to decide about.
                            Err(fault) => drop(answer.send(Err(fault))),
                            done => self.obeyed.push((answer, done, self.farewell.take())),
                        }
                    }
                    self.desk.remind();
                }
            }
            ControlFlow::Continue(())
        })
    }

    /// Puts a turn where everybody sees it, and answers those whose orders it has decided about.
    fn show(&mut self, control: &Control, turn: &Turn) {
        let known = self.tree.take().filter(|tree| **tree == *control.tree());
        let tree = known.unwrap_or_else(|| Arc::new(control.tree().clone()));
        self.tree = Some(Arc::clone(&tree));
        let berths = control.berths();
        if let Some(own) = &mut self.own {
            own.seen.extend(turn.view.machines.iter().map(|machine| (machine.id, machine.consumed)));
            own.seen.retain(|id, _| berths.get(id).is_some_and(|berth| berth.kind == Kind::Attached));
            let consumed = own.seen.values().fold(0, |sum: u64, consumed| sum.saturating_add(consumed.0));
            own.attached.store(consumed, Ordering::Relaxed);
        }
        let events: Vec<String> = turn.events.iter().map(ToString::to_string).collect();
        // That a VMM ends which has handed its machine over is no news: its pager has seen to it.
        let is_news = |event: &&Event| {
            !matches!(event, Event::Left { kind: Kind::HandedOver, why: Trouble::Gone(_), .. })
        };
        turn.events.iter().filter(is_news).for_each(|event| (self.note)(&event.to_string()));
        for event in &turn.events {
            if let Event::Left { name, why: Trouble::GivenBack, .. } = event {
                self.forget(name);
            }
        }
        let is_here =
            |name: &str| berths.values().any(|berth| berth.kind == Kind::HandedOver && berth.name == name);
        let waiting = self
            .roster
            .waiting()
            .filter(|(name, _)| !is_here(name))
            .map(|(name, why)| (name.to_owned(), why.map(str::to_owned)));
        let waiting = waiting.collect();
        self.desk.show(Moment {
            unix_ms: unix_ms(),
            tick: control.tick(turn),
            events,
            tree,
            groups: Arc::clone(&self.groups),
            berths,
            rules: self.roster.rules().map(|(id, rule)| (id, rule.to_owned())).collect(),
            waiting,
            own: control.own(),
            stores: self.own.as_ref().map(|own| Stores::of(&own.manager.lock())).unwrap_or_default(),
        });
        for (answer, obeyed, farewell) in self.obeyed.drain(..) {
            // Whoever asked may have gone; what was done stays done, and is shown.
            let tell = move || drop(answer.send(obeyed));
            match farewell {
                Some(farewell) => farewell.then(tell),
                None => tell(),
            }
        }
    }

    /// Takes in whoever has come.
    fn look_round(&mut self, control: &mut Control) {
        self.meet(control);
        let now = Instant::now();
        let (kept, config, groups) = (&self.kept, &self.config, &self.groups);
        let said_of = |name: &str| Some(said(kept, config.machine(name), groups, name));
        let rules = |sighting: &Sighting| {
            let Sighting { identity, vmm, name, uuid, .. } = sighting;
            let is_named = uuid.as_ref().is_some_and(|uuid| config.machines.contains_key(uuid));
            let is_let_go = kept.word(name).is_some_and(|word| word.attached == Some(false));
            let ruled =
                Ruled::of(config, identity.process, *vmm, name).filter(|_| !is_named && !is_let_go)?;
            Some(Ruled { config: said(kept, ruled.config, groups, name), ..ruled })
        };
        let rules: Option<&Rules<'_>> = if config.rules.is_empty() { None } else { Some(&rules) };
        for (id, name) in self.roster.take_in(control, now, &said_of, rules, &mut self.note) {
            if self.kept.is_paused(&name) {
                control.pause(id, true, now);
            }
        }
    }

    /// A machine was given back: what was said about it holds for no other of its name, and nobody attaches to it from outside.
    fn forget(&mut self, name: &str) {
        let is_of_file = self.config.machines.contains_key(name) || !self.config.rules.is_empty();
        if let Err(fault) = self.unsay(name, name, is_of_file) {
            (self.note)(&format!("what was said about {name} is still kept: {}", fault.message));
        }
        self.roster.forget(name);
    }

    /// Takes in machines that were handed over since the last look.
    fn meet(&mut self, control: &mut Control) {
        let Some(own) = &mut self.own else { return };
        let machines = {
            let manager = own.manager.lock();
            let there: BTreeSet<MachineId> = manager.ids().collect();
            own.met.retain(|id| there.contains(id));
            let new = there.difference(&own.met).filter(|id| !manager.is_gone(**id));
            let new = new.filter_map(|id| manager.machine(*id));
            new.map(|machine| (manager.custody(machine.id).map(|custody| custody.process()), machine))
                .collect::<Vec<_>>()
        };
        for (process, machine) in machines {
            let rule = process.and_then(|it| Ruled::of(&self.config, it, Vmm::Plimsoll, &machine.name));
            let of_file =
                rule.as_ref().map_or_else(|| self.config.machine(&machine.name), |rule| rule.config.clone());
            let config = said(&self.kept, of_file, &self.groups, &machine.name);
            let backend = || -> Box<dyn Backend> {
                let managed = Managed::new(Arc::clone(&own.manager), machine.id, 1, Instant::now());
                Box::new(match process {
                    Some(process) => managed.in_process(process),
                    None => managed,
                })
            };
            let settings = config.settings(MachineId(0), machine.size);
            let admitted = control.admit(&machine.name, settings, backend()).or_else(|error| {
                (self.note)(&format!("{} has no guarantee: {}", machine.name, explain(&error)));
                let usual = MachineConfig::default().settings(MachineId(0), machine.size);
                control.admit(&machine.name, usual, backend())
            });
            match admitted {
                Ok(id) => {
                    if let Some(ruled) = rule {
                        (self.note)(&format!("{} has what {} says", machine.name, ruled.rule));
                        self.roster.rule(id, Some(ruled));
                    }
                    if self.kept.is_paused(&machine.name) {
                        control.pause(id, true, Instant::now());
                    }
                }
                Err(error) => {
                    (self.note)(&format!("{} has an equal share: {}", machine.name, explain(&error)));
                }
            }
            own.met.insert(machine.id);
        }
    }

    /// What the file says about a machine of the loop: by its name, by that it is looked for by, or by a rule.
    fn of_file(&self, id: MachineId, name: &str) -> MachineConfig {
        let machines = &self.config.machines;
        let wanted = || machines.get(self.roster.wanted(id)?);
        let ruled = || self.roster.ruled(id).map(|ruled| &ruled.config);
        machines.get(name).or_else(wanted).or_else(ruled).cloned().unwrap_or_default()
    }

    fn obey(&mut self, control: &mut Control, order: Order) -> Obeyed {
        match order {
            Order::Attach(opened, settings) => self.attach(control, *opened, &settings).map(Some),
            Order::Set(id, settings) => {
                let name = name_of(control, id)?;
                let before = said(&self.kept, self.of_file(id, &name), &self.groups, &name);
                let wanted = settings.over(&before, &self.groups)?;
                let size = size_of(control, id);
                let in_force = control.tree().settings().machines.iter().find(|one| one.id == id).copied();
                control.change(wanted.settings(id, size)).map_err(|error| self.refusal(control, &error))?;
                let settings = Settings::said(&wanted, &self.groups);
                let kept = self.keep(&name, |word| word.settings = Some(settings));
                kept.inspect_err(|_| {
                    let _ = in_force.map(|before| control.change(before));
                })?;
                Ok(Some(id))
            }
            Order::Release(id) => self.release(control, id),
            Order::Forgo(name) => self.forgo(&name),
            Order::Pause(id, is_paused) => {
                let name = name_of(control, id)?;
                self.keep(&name, |word| word.paused = is_paused)?;
                control.pause(id, is_paused, Instant::now());
                Ok(Some(id))
            }
            Order::Reclaim(id, pages) => self.reclaim(control, id, pages),
            Order::Budget(budget) => {
                let before = control.tree().settings().capacity;
                self.set_budget(control, budget)?;
                self.kept.change(|words| words.budget_bytes = Some(budget.0)).map_err(|error| {
                    let _ = self.set_budget(control, before);
                    unkept(&error)
                })?;
                Ok(None)
            }
            Order::Reload(config) => self.reload(control, *config).map(|()| None),
        }
    }

    fn attach(
        &mut self,
        control: &mut Control,
        mut opened: Opened,
        said_now: &Settings,
    ) -> Result<MachineId, Fault> {
        let name = opened.name.clone();
        if control.names().any(|(_, other)| other == name) {
            return Err(Fault::new(Code::Conflict, format!("a machine called {name} is managed already")));
        }
        let (qmp, api, notes) = (opened.config.qmp.clone(), opened.config.api.clone(), opened.notes.clone());
        let before = said(&self.kept, self.config.machine(&name), &self.groups, &name);
        opened.config = said_now.over(&before, &self.groups)?;
        let settings = Settings::said(&opened.config, &self.groups);
        let id = opened.admit(control).map_err(|error| self.refusal(control, &error))?;
        let word = Word { attached: Some(true), paused: false, settings: Some(settings), qmp, api };
        if let Err(fault) = self.keep(&name, |kept| *kept = word) {
            drop(control.release(id));
            return Err(fault);
        }
        notes.iter().for_each(|note| (self.note)(note));
        self.roster.add(id, name);
        Ok(id)
    }

    /// Lets a machine go: one that is managed from outside at once, one of our own pager when its memory has come back.
    fn release(&mut self, control: &mut Control, id: MachineId) -> Obeyed {
        let name = name_of(control, id)?;
        if control.berth(id).is_some_and(|berth| berth.kind == Kind::HandedOver) {
            let refused = |why| Fault::new(Code::Conflict, format!("{name} is not released: {why}"));
            let help = "nothing was changed; raise the budget, or have other machines give first";
            return control.give_back(id).map(|()| Some(id)).map_err(|why| refused(why).help(help));
        }
        // The file may know it by its UUID.
        let wanted = self.roster.wanted(id).unwrap_or(&name).to_owned();
        let is_of_file = self.config.machines.contains_key(&wanted) || self.roster.ruled(id).is_some();
        self.unsay(&name, &wanted, is_of_file)?;
        self.roster.strike(id, &name);
        // Its VMM has what it had when it is told that it has.
        self.farewell = control.release(id);
        Ok(None)
    }

    /// Nobody waits any more for a machine that is not there.
    fn forgo(&mut self, name: &str) -> Obeyed {
        if !self.roster.waiting().any(|(waiting, _)| waiting == name) {
            return Err(Fault::gone());
        }
        self.unsay(name, name, self.config.machines.contains_key(name))?;
        self.roster.forget(name);
        Ok(None)
    }

    /// Nothing is said any more about a machine, but that it is not to be managed, if the file would have it: as `wanted`, or by a rule.
    fn unsay(&mut self, name: &str, wanted: &str, is_of_file: bool) -> Result<(), Fault> {
        let attached = is_of_file.then_some(false);
        let unsaid = |words: &mut Words| {
            words.machines.remove(name);
            words.machines.insert(wanted.to_owned(), Word { attached, ..Word::default() });
        };
        self.kept.change(unsaid).map_err(|error| unkept(&error))
    }

    fn reclaim(&mut self, control: &mut Control, id: MachineId, pages: PageCount) -> Obeyed {
        let name = name_of(control, id)?;
        if control.berth(id).is_some_and(|berth| berth.is_paused) {
            let text = format!("{name} is paused: nothing is taken from it");
            return Err(Fault::new(Code::Conflict, text).help("resume it first"));
        }
        match control.reclaim(id, pages, Instant::now()) {
            Done::Begun => Ok(Some(id)),
            Done::Refused(why) => {
                Err(Fault::new(Code::Conflict, format!("nothing is taken from {name}: {why}")))
            }
        }
    }

    fn set_budget(&self, control: &mut Control, budget: ByteCount) -> Result<(), Fault> {
        if budget < BUDGET_MIN {
            let text = format!("a budget of {budget}: a machine cannot run in less than {BUDGET_MIN}");
            return Err(Fault::new(Code::Unprocessable, text));
        }
        let host = crate::control::Pool::host().map_or(ByteCount(u64::MAX), |pool| pool.total());
        if budget > host {
            let text = format!("a budget of {budget}: this host has {host}");
            return Err(Fault::new(Code::Unprocessable, text));
        }
        if let Some(own) = &self.own {
            let fixed = own.manager.lock().host().ledger(|ledger| {
                let usage = ledger.host_usage();
                ledger.overhead() + usage.of(LedgerKind::Tables) + usage.of(LedgerKind::Store)
            });
            if budget < fixed + BUDGET_MIN {
                let text = format!(
                    "a budget of {budget}: {fixed} are in use that cannot be taken (stored pages, tables, processes)"
                );
                return Err(Fault::new(Code::Conflict, text)
                    .help(format!("leave at least {BUDGET_MIN} more; nothing was changed")));
            }
        }
        control.set_total(budget).map_err(|error| self.contradiction(control, &error))?;
        if let Some(own) = &self.own {
            let manager = own.manager.lock();
            manager.host().ledger(|ledger| ledger.set_budget(Budget::within(budget)));
            manager.host().bustle().stir();
            *own.budget.lock() = budget;
        }
        Ok(())
    }

    /// Keeps something about a machine for the next manager.
    fn keep(&mut self, name: &str, change: impl FnOnce(&mut Word)) -> Result<(), Fault> {
        let change = |words: &mut Words| change(words.machines.entry(name.to_owned()).or_default());
        self.kept.change(change).map_err(|error| unkept(&error))
    }

    fn refusal(&self, control: &Control, error: &AdmissionError) -> Fault {
        match error {
            AdmissionError::Settings(error) => self.contradiction(control, error),
            error => Fault::new(Code::Conflict, explain(error)),
        }
    }

    /// In the names that machines and groups have.
    fn contradiction(&self, control: &Control, error: &SettingsError) -> Fault {
        contradiction(control, &self.groups, error)
    }
}

type Groups = BTreeMap<String, GroupSettings>;

/// In the names that machines and these groups have.
fn contradiction(control: &Control, groups: &Groups, error: &SettingsError) -> Fault {
    let name = |owner| match owner {
        // One that is being taken in has no name here yet.
        Owner::Machine(id) => control
            .names()
            .find(|(own, _)| *own == id)
            .map_or_else(|| "the machine".to_owned(), |(_, name)| name.to_owned())
            .into(),
        Owner::Group(id) => group_name(groups, id),
        Owner::Host => None,
    };
    let is_its_own = matches!(error.owner(), Owner::Machine(_));
    let code = if is_its_own { Code::Unprocessable } else { Code::Conflict };
    Fault::new(code, error.named(&name).to_string())
}

/// Machines that are to be managed from outside, by the file and by the API.
fn wanted(config: &Config, kept: &Kept) -> BTreeSet<String> {
    let said = |name: &str| kept.word(name).and_then(|word| word.attached);
    let named = config.machines.keys().filter(move |name| said(name) != Some(false));
    let also = kept.words().machines.iter().filter(|(_, word)| word.attached == Some(true));
    named.chain(also.map(|(name, _)| name)).cloned().collect()
}

/// The RAM a machine's guest owns.
fn size_of(control: &Control, id: MachineId) -> ByteCount {
    let shown = control.berth(id).and_then(|berth| berth.size);
    shown.or_else(|| control.tree().terms(id).map(|terms| terms.size.bytes())).unwrap_or_default()
}

/// What is said about the machine of a name: by the API, else by the file.
fn said(kept: &Kept, of_file: MachineConfig, groups: &Groups, name: &str) -> MachineConfig {
    let Some(word) = kept.word(name) else { return of_file };
    let of_file = MachineConfig {
        qmp: word.qmp.clone().or(of_file.qmp.clone()),
        api: word.api.clone().or(of_file.api.clone()),
        ..of_file
    };
    let Some(settings) = &word.settings else { return of_file };
    // Groups come and go with the file: what was said of one that is gone is no reason to forget the rest.
    let own = settings
        .over(&MachineConfig { parent: None, ..of_file.clone() }, groups)
        .or_else(|_| Settings { group: None, ..settings.clone() }.over(&of_file, groups));
    own.unwrap_or(of_file)
}

fn name_of(control: &Control, id: MachineId) -> Result<String, Fault> {
    let found = control.names().find(|(own, _)| *own == id).map(|(_, name)| name.to_owned());
    found.ok_or_else(Fault::gone)
}

fn unkept(error: &KeptError) -> Fault {
    Fault::new(Code::Failed, explain(error))
        .help("nothing was changed; make room for that file, and ask again")
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl std::fmt::Debug for Helm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Helm").field("roster", &self.roster).finish_non_exhaustive()
    }
}
