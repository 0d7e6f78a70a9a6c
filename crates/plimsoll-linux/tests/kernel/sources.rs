//! Every way this kernel has to see which pages are used, on one guest whose hot set is known.
use crate::guest::Started;
use crate::steady::attach;
use crate::{Outcome, outcome, swap};
use plimsoll_linux::kernel::Layout;
use plimsoll_linux::kernel::source::{Damon, IdleBitmap, Source, SourceError};
use plimsoll_linux::reclaimer::Reclaimer;
use plimsoll_linux::system::Linux;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_types::{ByteCount, PageCount};
use std::time::{Duration, Instant};

/// Pages of a guest of 64 MiB that are used forty times in a period.
const HOT: u64 = 4000;
const PERIOD: Duration = Duration::from_secs(2);
const PERIODS: u64 = 4;

pub(crate) fn compare() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let mut guest = Started::new("private", 64);
        guest.ask(&format!("sweep {HOT} scattered 50"));
        let layout = Layout::new(vec![guest.ram]).unwrap();
        let taking = attach(&mut guest).without_idle_flags();
        let mut sources: Vec<(Box<dyn Source>, u64)> = vec![(Box::new(taking), 20)];
        match IdleBitmap::open(guest.id(), &layout) {
            Ok(idle) => {
                let watching = attach(&mut guest);
                assert!(watching.has_idle_flags());
                sources.push((Box::new(watching), 20));
                sources.push((Box::new(idle), 35));
            }
            Err(error @ SourceError::NotTracked) => {
                println!("the source of idle flags is not compared: {error}")
            }
            Err(error) => panic!("{error}"),
        }
        // Its settings are the whole kernel's, so somebody has to say that they may be changed; regions tell no single pages.
        if std::env::var_os("PLIMSOLL_DAMON").is_none() {
            println!("DAMON is not compared: PLIMSOLL_DAMON is not set");
        } else {
            match Damon::open(&Linux, guest.id(), &layout) {
                Ok(damon) => sources.push((Box::new(damon), 400)),
                Err(error) => println!("DAMON is not compared: {error}"),
            }
        }
        for (source, tolerance) in &mut sources {
            let mut sum = 0;
            for _ in 0..PERIODS {
                source.begin().unwrap();
                // The period itself: what is measured is what the guest does in it.
                std::thread::sleep(PERIOD);
                let used = source.end().unwrap().unwrap();
                println!("{}: {used}", source.name());
                sum += used.0;
            }
            let mean = sum / PERIODS;
            println!("{}: {} of {HOT} pages", source.name(), PageCount(mean));
            assert!(mean.abs_diff(HOT) * 100 <= HOT * *tolerance, "{}: {mean}", source.name());
        }
        // Why there is no source by physical regions: see the documentation of `source`.
        guest.ask("idle");
        let mut machine = attach(&mut guest);
        machine.reclaim(guest.ram.len().pages_floor(), Instant::now()).unwrap();
        assert_eq!(guest.number("verify"), 0);
        let frames = Pagemap::open(guest.id()).unwrap().frames(guest.ram).unwrap();
        let mut frames: Vec<u64> = frames.into_iter().flatten().map(|frame| frame.0).collect();
        frames.sort_unstable();
        let runs = frames.chunk_by(|one, next| one + 1 == *next).count();
        println!("{} frames lie in {runs} runs", frames.len());
        drop((guest, sources, machine));
        swap.remove().unwrap();
        Ok(())
    })
}
