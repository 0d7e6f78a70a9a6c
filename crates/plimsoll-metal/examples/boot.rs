//! Boots the hypervisor with two guests that own more than the machine has, and prints what it says.
//!
//! Further arguments are QEMU's. With `-S` the machine waits: for a debugger at `-s`, TCP port 1234.
use plimsoll_guest::abi::{ABI_VERSION, MAX_REGIONS, PARAMS_MAGIC, Params, Region};
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_metal::wire::ProgramKind;
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
        let mut regions = [Region::default(); MAX_REGIONS];
        regions[0] = Region { gpa: 0, len: 64 << 20 };
        let params = Params {
            magic: PARAMS_MAGIC,
            version: ABI_VERSION,
            vcpus: 1,
            tsc_hz: 0,
            seed,
            pool_seed: 1,
            pool_pages: 512,
            region_count: 1,
            reserved: 0,
            regions,
            mix: Mix { zero: 25, duplicate: 20, text: 45, random: 10 },
            workload,
        };
        options.guests.push(Guest { name: format!("guest{seed}"), program: ProgramKind::WORKLOAD, params });
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
