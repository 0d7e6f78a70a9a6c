//! The manager's control loop and its API: threads of their own, started when machines are served.
//!
//! Enters: the manager that serves them, what is in use. Leaves: decisions about machines of both kinds, answers on a socket. What
//! must never happen: a guest that waits because one of them does, or a manager that ends because they cannot be had: then
//! machines have equal shares, and that is told.
use super::Settings;
use super::manage::Used;
use super::place::API;
use crate::api::Api;
use crate::api::exchange::exchange;
use crate::config::Config;
use crate::control::{Control, Pool};
use crate::helm::kept::{Kept, KeptError};
use crate::helm::{Helm, Own};
use parking_lot::Mutex;
use plimsoll_linux::explain;
use plimsoll_linux::uffd::manager::{Manager, Meter};
use plimsoll_sys::eventfd::EventFd;
use plimsoll_types::ByteCount;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
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
        self.used.now() + ByteCount(self.attached.load(Ordering::Relaxed))
    }
}

/// The loop and the API while they run.
pub(super) struct Steering {
    api: Option<Api>,
    thread: Option<(EventFd, JoinHandle<()>)>,
    heard: Receiver<String>,
}

impl Steering {
    /// Starts both. What cannot be had is heard of.
    pub(super) fn start(
        settings: &Settings,
        kept: Result<Kept, KeptError>,
        manager: &Arc<Mutex<Manager>>,
        used: &Used,
        budget: &Arc<Mutex<ByteCount>>,
    ) -> Self {
        let (say, heard) = channel();
        let mut steering = Self { api: None, thread: None, heard };
        let own = Own::new(Arc::clone(manager), Arc::clone(budget));
        let said = |text: String| drop(say.send(text));
        let config = settings.config.as_ref().map(|path| Config::read(path)).transpose();
        let config = config.unwrap_or_else(|error| {
            said(format!("the settings are not in force: {}", explain(&error)));
            None
        });
        let kept = match kept {
            Ok(kept) => kept,
            Err(error) => {
                said(format!("no decisions are made, and machines have equal shares: {}", explain(&error)));
                return steering;
            }
        };
        let config = config.unwrap_or_default();
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
                if let Err(error) = helm.run(control, Some(told.as_fd())) {
                    let _ = say.send(format!("no more decisions are made: {}", explain(&error)));
                }
            };
            let thread = std::thread::Builder::new().name("helm".to_owned()).spawn(run);
            Ok(((end, thread.map_err(|error| explain(&error))?), door))
        });
        match begun {
            Ok((thread, door)) => {
                steering.thread = Some(thread);
                match Api::start(&settings.directory.join(API), door) {
                    Ok(api) => steering.api = Some(api),
                    Err(error) => said(explain(&error)),
                }
            }
            Err(why) => said(format!("no decisions are made, and machines have equal shares: {why}")),
        }
        steering
    }

    /// What an operator should hear since the last time.
    pub(super) fn heard(&mut self) -> Vec<String> {
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

    /// Ends both. Nothing of theirs has the manager any more.
    pub(super) fn stop(mut self) {
        self.api = None;
        if let Some((end, thread)) = self.thread.take() {
            let _ = end.signal();
            let _ = thread.join();
        }
    }
}
