//! A thousand machines.
use super::estate::{Estate, PATIENCE};
use plimsoll_host::api::Machines;
use std::time::{Duration, Instant};

const ANSWERED_WITHIN: Duration = Duration::from_millis(20);

#[test]
fn a_thousand_machines_are_listed_in_less_than_20_ms_ninety_nine_times_in_a_hundred() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1000, 128 << 10);
    let client = estate.client();
    let measured = || {
        let mut times: Vec<Duration> = (0..300)
            .map(|_| {
                let began = Instant::now();
                let answer = client.exchange("GET", "/v1/machines", &[], Vec::new()).unwrap();
                let took = began.elapsed();
                assert_eq!(answer.status, 200);
                took
            })
            .collect();
        times.sort();
        (times[150], times[296])
    };
    // Other tests, and whatever else this machine does, take it from both sides for longer than that now and then: it is measured until
    // they leave it alone.
    let deadline = Instant::now() + PATIENCE;
    let (mut median, mut p99) = measured();
    while p99 >= ANSWERED_WITHIN && Instant::now() < deadline {
        println!("once more, after a p99 of {p99:?}");
        (median, p99) = measured();
    }
    let all: Machines = client.get("/v1/machines?limit=1000").unwrap();
    assert_eq!((all.machines.len(), all.total, all.next), (1000, 1000, None));
    let began = Instant::now();
    let whole = estate.get("/v1/machines?limit=1000").body.len();
    println!(
        "a page of 100 of 1,000: median {median:?}, p99 {p99:?}; all in one, {whole} bytes: {:?}",
        began.elapsed()
    );
    assert!(p99 < ANSWERED_WITHIN, "p99 {p99:?}, median {median:?}");
}
