//! The manager's control loop and its API: threads of their own, started when machines are served.
//!
//! Enters: the manager that serves them, what is in use. Leaves: decisions about machines of both kinds, answers on a socket. What
//! must never happen: a guest that waits because one of them does, or a manager that ends because they cannot be had: then
//! machines have equal shares, and that is told.
use super::accepted::Accepted;
use super::manage::Used;
use super::place::API;
use super::{BudgetBy, Settings};
use crate::api::exchange::{Bell, Order, exchange};
use crate::api::{Access, Api, Gate};
use crate::config::Config;
use crate::control::{Control, Pool, host_pressure};
use crate::helm::kept::{Kept, KeptError};
use crate::helm::{Helm, Own};
use parking_lot::Mutex;
use plimsoll_linux::explain;
use plimsoll_linux::uffd::manager::{Manager, Meter};
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::psi::PressureTrigger;
use plimsoll_types::ByteCount;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

/// What all machines take up: those under our pager with their VMMs, as it is counted for the hard line, and what was last seen of
/// those managed from outside.
struct Everything {
    used: Used,
    attached: Arc<AtomicU64>,
}

impl Meter for Everything {
    fn used(&mut self) -> ByteCount {
        self.used.lately() + ByteCount(self.attached.load(Ordering::Relaxed))
    }
}

/// The loop and the API while they run.
pub(super) struct Steering {
    api: Option<Api>,
    thread: Option<(EventFd, JoinHandle<()>)>,
    heard: Receiver<String>,
    say: Sender<String>,
    reading: Reading,
}

/// The settings file being read again, on a thread that nobody waits for: a file may lie where reading takes long.
struct Reading {
    path: Option<PathBuf>,
    budget_by: BudgetBy,
    accepted: Accepted,
    bell: Option<Arc<Bell>>,
    gate: Option<Gate>,
    thread: Option<JoinHandle<()>>,
    /// It was asked for again meanwhile, and what is being read may be older.
    again: bool,
}

impl Steering {
    /// Starts both. What cannot be had is heard of.
    pub(super) fn start(
        settings: &Settings,
        kept: Result<Kept, KeptError>,
        pressure: Option<PressureTrigger>,
        manager: &Arc<Mutex<Manager>>,
        used: &Used,
        budget: &Arc<Mutex<ByteCount>>,
    ) -> Self {
        let (say, heard) = channel();
        let (path, budget_by) = (settings.config.clone(), settings.budget_by);
        let accepted = Accepted::of(&settings.directory);
        let reading =
            Reading { path, budget_by, accepted, bell: None, gate: None, thread: None, again: false };
        let mut steering = Self { api: None, thread: None, heard, say: say.clone(), reading };
        let own = Own::new(Arc::clone(manager), Arc::clone(budget));
        let said = |text: String| drop(say.send(text));
        let config = settings.config.as_ref().map(|path| {
            let (config, note) = steering.reading.accepted.begin(path);
            note.into_iter().for_each(said);
            config
        });
        let kept = match kept {
            Ok(kept) => kept,
            Err(error) => {
                said(format!("no decisions are made, and machines have equal shares: {}", explain(&error)));
                return steering;
            }
        };
        let config = settings.budget_by.heed(config.unwrap_or_default());
        let access = Access::prepare(&config.api, &Access::default()).unwrap_or_else(|error| {
            said(format!("only root and this daemon's user may use the API: {}", explain(&error)));
            Access::default()
        });
        if let Some(address) = access.address() {
            said(format!("the API is served at https://{address}"));
        }
        let everything = Everything { used: used.clone(), attached: Arc::clone(&own.attached) };
        let total = *budget.lock();
        let pool = Pool::metered(total, Box::new(everything));
        let control = Control::new(config.settings(total), pool, ByteCount(0), Instant::now());
        let note = {
            let say = say.clone();
            // Whoever listens may be about to stop.
            move |text: &str| drop(say.send(text.to_owned()))
        };
        let begun = control.map_err(|error| explain(&error)).and_then(|control| {
            let (desk, door) = exchange().map_err(|error| explain(&error))?;
            let end = EventFd::new().map_err(|error| explain(&error))?;
            let told = end.as_fd().try_clone_to_owned().map_err(|error| explain(&error))?;
            let say = say.clone();
            let run = move || {
                let helm = Helm::new(config, kept, Some(own), desk, Box::new(note));
                let pressure = pressure.or_else(host_pressure);
                if let Err(error) = helm.run(control, Some(told.as_fd()), pressure.as_ref()) {
                    let _ = say.send(format!("no more decisions are made: {}", explain(&error)));
                }
            };
            let thread = std::thread::Builder::new().name("helm".to_owned()).spawn(run);
            Ok(((end, thread.map_err(|error| explain(&error))?), door))
        });
        match begun {
            Ok((thread, door)) => {
                steering.thread = Some(thread);
                steering.reading.bell = Some(Arc::new(door.bell()));
                match Api::start(&settings.directory.join(API), door, access) {
                    Ok(api) => {
                        steering.reading.gate = Some(api.gate());
                        steering.api = Some(api);
                    }
                    Err(error) => said(explain(&error)),
                }
            }
            Err(why) => said(format!("no decisions are made, and machines have equal shares: {why}")),
        }
        steering
    }

    /// Has the settings file read again. What becomes of that is heard of.
    pub(super) fn reload(&mut self) {
        if self.reading.thread.is_some() {
            self.reading.again = true;
            return;
        }
        let say = self.say.clone();
        let tell = move |text: String| drop(say.send(text));
        let (path, bell) = match (&self.reading.path, &self.reading.bell) {
            (None, _) => return tell("there is no settings file to read again: see --config".to_owned()),
            (_, None) => {
                return tell("no decisions are made, so there is nothing to put in force".to_owned());
            }
            (Some(path), Some(bell)) => (path.clone(), Arc::clone(bell)),
        };
        let read = {
            let (tell, budget_by) = (tell.clone(), self.reading.budget_by);
            let (accepted, gate) = (self.reading.accepted.clone(), self.reading.gate.clone());
            move || tell(reread(&path, budget_by, &accepted, &bell, gate.as_ref()))
        };
        match std::thread::Builder::new().name("settings".to_owned()).spawn(read) {
            Ok(thread) => self.reading.thread = Some(thread),
            Err(error) => tell(format!("the settings cannot be read again: {error}")),
        }
    }

    /// What an operator should hear since the last time.
    pub(super) fn heard(&mut self) -> Vec<String> {
        if let Some(thread) = self.reading.thread.take_if(|thread| thread.is_finished()) {
            let _ = thread.join();
            if std::mem::take(&mut self.reading.again) {
                self.reload();
            }
        }
        let mut heard: Vec<String> = self.heard.try_iter().collect();
        if let Some((_, thread)) = self.thread.take_if(|(_, thread)| thread.is_finished())
            && thread.join().is_err()
        {
            heard.push(
                "the control loop has failed: machines have equal shares until the manager is replaced"
                    .to_owned(),
            );
        }
        heard
    }

    /// Ends both; a file that is being read is not waited for. Nothing of theirs has the manager any more.
    pub(super) fn stop(mut self) {
        self.api = None;
        if let Some((end, thread)) = self.thread.take() {
            let _ = end.signal();
            let _ = thread.join();
        }
    }
}

/// Reads the file, has it put in force, by the loop and for the API, and keeps it for the next manager. What became of that.
fn reread(path: &Path, budget_by: BudgetBy, accepted: &Accepted, bell: &Bell, gate: Option<&Gate>) -> String {
    let put = || {
        let (config, texts) = Config::read_texts(path).map_err(|error| explain(&error))?;
        config.suits_a_daemon()?;
        if budget_by == BudgetBy::File && config.budget.is_none() {
            // The next keeper would not know what machines may use.
            return Err("`budget` is gone from [host], and no --budget was said: put it back".to_owned());
        }
        let access = gate.map(|gate| Access::prepare(&config.api, &gate.access())).transpose();
        let access = access.map_err(|error| explain(&error))?;
        bell.order(Order::Reload(Box::new(budget_by.heed(config)))).map_err(|fault| fault.message)?;
        // Nothing of it can fail any more but the socket's own file, which is then as it was.
        let admitted = gate.zip(access).map_or(Ok(()), |(gate, access)| gate.admit(access));
        let but = admitted.err().map(|error| format!(", but for who may use the API: {}", explain(&error)));
        Ok::<_, String>((texts, but.unwrap_or_default()))
    };
    match put() {
        Ok((texts, but)) => {
            accepted.keep(&texts).err().unwrap_or_else(|| format!("the settings {path:?} are in force{but}"))
        }
        Err(why) => format!("the settings were not changed, and those of before stay in force: {why}"),
    }
}
