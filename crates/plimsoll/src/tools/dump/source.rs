//! What tells of a machine's registers, and has it stand still: QEMU's monitor, or a machine of our own.
//!
//! A machine of our own has its vCPUs stand still and its pager go on, which brings what is read. It goes on when it is told to, or its
//! socket is closed: also when this is killed.
use super::super::born::Born;
use super::super::machine::Teller;
use super::super::said;
use super::pause::Monitor;
use super::{DumpArgs, Kind, go_on};
use crate::demo::Interrupt;
use plimsoll_attach::qmp::Registers;
use plimsoll_sys::pidfd::Pidfd;
use std::time::{Duration, Instant};

pub(super) enum Source<'a> {
    Monitor(Monitor<'a>),
    /// And since when it stands still.
    Born(Box<Born>, Option<Instant>),
}

/// Registers, and what there is to say against them.
pub(super) type Told = (Vec<(u32, Registers)>, Vec<String>);

impl<'a> Source<'a> {
    pub(super) fn new(teller: Teller, vmm: &'a Pidfd) -> Self {
        match teller {
            Teller::Monitor(qmp) => Self::Monitor(Monitor::new(qmp, vmm)),
            Teller::Born(born) => Self::Born(Box::new(born), None),
        }
    }

    /// All processors' registers, and the machine stands still if it is to.
    pub(super) fn begin(&mut self, args: &DumpArgs, interrupt: &Interrupt) -> Result<Told, String> {
        match self {
            Self::Monitor(monitor) => {
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
            Self::Born(born, since) => {
                if args.paused {
                    *since = Some(Instant::now());
                    born.hold()?;
                }
                let mut told = Told::default();
                for number in born.processors() {
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

    /// Lets the machine go on and says how long it stood still.
    pub(super) fn end(&mut self) -> Result<Option<Duration>, String> {
        match self {
            Self::Monitor(monitor) => monitor.resume(),
            Self::Born(born, since) => {
                if since.is_some() {
                    born.release()?;
                }
                Ok(since.take().map(|since| since.elapsed()))
            }
        }
    }
}
