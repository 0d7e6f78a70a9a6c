//! Boots the hypervisor with two guests that own more than the machine has, and prints what it says.
//!
//! Further arguments are QEMU's. With `-S` the machine waits: for a debugger at `-s`, TCP port 1234.
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_metal::{Event, Guest, Options, Run};
use plimsoll_types::ByteCount;
use std::error::Error;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let mut options = Options::new(ByteCount::mib(96));
    options.seconds = 3;
    options.arguments = std::env::args().skip(1).collect();
    for seed in 1..=2 {
        let workload =
            WorkloadSpec { final_check: 1, ops_per_second: 2000, ..WorkloadSpec::new(WorkloadKind::Zipf) };
        options.guests.push(Guest::new(format!("guest{seed}"), ByteCount::mib(64), seed, workload));
    }
    // An hour: a debugger's user takes time.
    let mut run = Run::start(&options)?;
    println!("symbols: {}", run.image().display());
    loop {
        match run.next(Duration::from_secs(3600))? {
            Event::Said(line) => println!("{line}"),
            Event::Report(line) => println!("{line:?}"),
            Event::Done => return Ok(()),
            end => return Err(format!("it did not end well: {end:?} {}", run.complaints()).into()),
        }
    }
}
