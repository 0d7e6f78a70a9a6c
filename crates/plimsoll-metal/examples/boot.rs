//! Boots the hypervisor with two guests that own more than the machine has, one on shadow tables, and prints what it says.
//!
//! Further arguments are QEMU's. With `-S` the machine waits: for a debugger at `-s`, TCP port 1234.
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_metal::wire::{Line, Paging};
use plimsoll_metal::{Event, Guest, MetalError, Options, Run, Ticks};
use plimsoll_types::ByteCount;
use std::time::Duration;

fn main() -> Result<(), MetalError> {
    let mut options = Options::new(ByteCount::mib(96));
    (options.seconds, options.ticks) = (3, Ticks::Instructions);
    options.arguments = std::env::args().skip(1).collect();
    let workload =
        WorkloadSpec { final_check: 1, ops_per_second: 2000, ..WorkloadSpec::new(WorkloadKind::Zipf) };
    for (seed, paging) in [(1, Paging::NESTED), (2, Paging::SHADOW)] {
        let guest = Guest::new(format!("guest{seed}"), ByteCount::mib(64), seed, workload);
        options.guests.push(Guest { paging, ..guest });
    }
    let run = Run::start(&options)?;
    println!("symbols: {}", run.image().display());
    // An hour: a debugger's user takes time.
    run.finish(Duration::from_secs(3600), |event| match event {
        Event::Said(line) => println!("{line}"),
        Event::Report(line) => match *line {
            Line::Guest(guest) => {
                println!("{guest:?}: {} exits per million instructions", guest.exits_per_million())
            }
            line => println!("{line:?}"),
        },
        _ => {}
    })
}
