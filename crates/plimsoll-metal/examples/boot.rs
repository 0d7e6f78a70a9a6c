//! Boots the hypervisor with two guests that own more than the machine has, one on shadow tables, and prints what it says.
//!
//! Further arguments are QEMU's. With `-S` the machine waits: for a debugger at `-s`, TCP port 1234.
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_metal::wire::{Line, Paging};
use plimsoll_metal::{Event, Guest, Options, Run, Ticks};
use plimsoll_types::ByteCount;
use std::error::Error;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let mut options = Options::new(ByteCount::mib(96));
    (options.seconds, options.ticks) = (3, Ticks::Instructions);
    options.arguments = std::env::args().skip(1).collect();
    for (seed, paging) in [(1, Paging::NESTED), (2, Paging::SHADOW)] {
        let workload =
            WorkloadSpec { final_check: 1, ops_per_second: 2000, ..WorkloadSpec::new(WorkloadKind::Zipf) };
        let guest = Guest::new(format!("guest{seed}"), ByteCount::mib(64), seed, workload);
        options.guests.push(Guest { paging, ..guest });
    }
    // An hour: a debugger's user takes time.
    let mut run = Run::start(&options)?;
    println!("symbols: {}", run.image().display());
    loop {
        match run.next(Duration::from_secs(3600))? {
            Event::Said(line) => println!("{line}"),
            Event::Report(line) => {
                println!("{line:?}");
                if let Line::Guest(guest) = *line {
                    println!("{}: {} exits per million instructions", guest.name, guest.exits_per_million());
                }
            }
            Event::Done => return Ok(()),
            end => return Err(format!("it did not end well: {end:?} {}", run.complaints()).into()),
        }
    }
}
