//! What tells of a machine's registers, and has it stand still: QEMU's monitor, or a machine of our own.
//!
//! A machine of our own has its vCPUs stand still and its pager go on, which brings what is read. It goes on when it is told to, or its
//! socket is closed: also when this is killed. It does so by itself when it is to stop, its manager is lost, or the VMM's limit is over. What
//! must never happen: a copy kept that the machine was not still for, or this process suspended by its terminal while a machine stands
//! still for it.
use super::super::born::Born;
use super::super::machine::Teller;
use super::super::said;
use super::pause::Monitor;
use super::{DumpArgs, Kind, go_on};
use crate::demo::Interrupt;
use plimsoll_attach::qmp::Registers;
use plimsoll_sys::pidfd::Pidfd;
use signal_hook::consts::{SIGTSTP, SIGTTIN, SIGTTOU};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(super) struct Source<'a> {
    way: Way<'a>,
    /// Whether a terminal may suspend this process.
    may_rest: Arc<AtomicBool>,
}

/// How the machine is spoken to.
enum Way<'a> {
    Monitor(Monitor<'a>),
    /// And since when it stands still.
    Born(Box<Born>, Option<Instant>),
}

/// Registers, and what there is to say against them.
pub(super) type Told = (Vec<(u32, Registers)>, Vec<String>);

impl<'a> Source<'a> {
    pub(super) fn new(teller: Teller, vmm: &'a Pidfd) -> Self {
        let way = match teller {
            Teller::Monitor(qmp) => Way::Monitor(Monitor::new(qmp, vmm)),
            Teller::Born(born) => Way::Born(Box::new(born), None),
        };
        Self { way, may_rest: Arc::new(AtomicBool::new(true)) }
    }

    /// Until the machine goes on: a process that its terminal has suspended lets nobody go on.
    fn stay_awake(&self) -> Result<(), String> {
        for signal in [SIGTSTP, SIGTTIN, SIGTTOU] {
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&self.may_rest))
                .map_err(said)?;
        }
        self.may_rest.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// All processors' registers, and the machine stands still if it is to.
    pub(super) fn begin(&mut self, args: &DumpArgs, interrupt: &Interrupt) -> Result<Told, String> {
        if args.paused {
            self.stay_awake()?;
        }
        match &mut self.way {
            Way::Monitor(monitor) => {
                if args.paused {
                    monitor.stop()?;
                }
                let numbers = monitor.qmp.processors().map_err(said)?;
                let one = |number| {
                    go_on(interrupt)?;
                    Ok((number, monitor.qmp.registers(number).map_err(said)?))
                };
                Ok((numbers.into_iter().map(one).collect::<Result<_, String>>()?, Vec::new()))
            }
            Way::Born(born, since) => {
                if args.paused {
                    *since = Some(born.hold(|| go_on(interrupt))?);
                }
                let mut told = Told::default();
                for number in born.processors() {
                    go_on(interrupt)?;
                    match born.registers(number) {
                        Ok(registers) => told.0.push((number, registers)),
                        // All memory can be had without.
                        Err(why) if args.kind == Kind::All => told.1.push(why),
                        Err(why) => return Err(why),
                    }
                }
                Ok(told)
            }
        }
    }

    /// Lets the machine go on and says how long it stood still. Fails if it did not stand still to the end.
    pub(super) fn end(&mut self) -> Result<Option<Duration>, String> {
        let stood = match &mut self.way {
            Way::Monitor(monitor) => monitor.resume()?,
            Way::Born(born, since) => match since.take() {
                Some(since) => Some(let_go(born, since)?),
                None => None,
            },
        };
        self.may_rest.store(true, Ordering::Relaxed);
        Ok(stood)
    }
}

/// Has a machine of our own go on that stands still since then.
fn let_go(born: &mut Born, since: Instant) -> Result<Duration, String> {
    let before = born.release()?;
    let stood = since.elapsed();
    match before {
        None => Ok(stood),
        // When it did nobody says: it was heard of only now.
        Some(why) => Err(format!(
            "the machine went on by itself after at most {:.1} s: what was copied is not of one moment ({why})",
            stood.as_secs_f64()
        )),
    }
}
