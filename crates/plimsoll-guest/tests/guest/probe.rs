//! A probing guest over plain memory: it does what it is asked and nothing else, and answers with what it found.
use crate::machine::{VecMachine, params};
use plimsoll_guest::abi::{Params, WORKLOAD_GPA};
use plimsoll_guest::probe::{Order, ProbeCommand, Probed, Task};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_guest::{Guest, PAGE_WORDS};

/// What a guest answers to these commands, numbered from 1.
fn answers(params: &Params, machine: &mut VecMachine, commands: &[ProbeCommand]) -> Vec<Probed> {
    machine.commands =
        (1..).zip(commands).map(|(number, command)| ProbeCommand { number, ..*command }).collect();
    Guest::new(params).unwrap().run(0, machine).unwrap();
    let answers = std::mem::take(&mut machine.answers);
    assert_eq!(answers[0], Probed::NONE, "there is nothing to answer at first");
    answers[1..].to_vec()
}

fn probing() -> Params {
    let mut params = params(WorkloadKind::Probe, 1, 1000);
    params.workload.final_check = 0;
    params
}

#[test]
fn each_command_is_answered_with_its_number_its_pages_and_their_times() {
    let params = probing();
    let pages = Guest::new(&params).unwrap().layout().data_pages();
    let commands = [
        ProbeCommand::new(Task::Populate, Order::Ascending),
        ProbeCommand::new(Task::Read, Order::Random),
        ProbeCommand { pages: 100, stride: 10, ..ProbeCommand::new(Task::Write, Order::Strided) },
        ProbeCommand { passes: 3, pages: 7, ..ProbeCommand::new(Task::Read, Order::Ascending) },
        ProbeCommand::new(Task::Verify, Order::Ascending),
    ];
    let answers = answers(&params, &mut VecMachine::new(&params), &commands);
    let expected = [pages, pages, 10, 21, pages];
    assert_eq!(answers.iter().map(|answer| answer.pages).collect::<Vec<_>>(), expected);
    for (number, answer) in (1..).zip(answers) {
        assert_eq!((answer.number, answer.wrong_words), (number, 0));
        // Every look at the clock takes a tick, and there are two to a page.
        assert!(answer.touch_ticks >= answer.pages && answer.ticks > answer.touch_ticks, "command {number}");
        assert_eq!(answer.latency.iter().map(|count| u64::from(*count)).sum::<u64>(), answer.pages);
    }
}

#[test]
fn a_touch_reaches_the_named_pages_only_and_a_write_leaves_them_as_they_are() {
    let params = probing();
    let layout = Guest::new(&params).unwrap().layout().clone();
    let mut machine = VecMachine::new(&params);
    let part = |task| ProbeCommand { first_page: 20, pages: 5, ..ProbeCommand::new(task, Order::Ascending) };
    let answer = answers(&params, &mut machine, &[part(Task::Populate), part(Task::Write)]);
    assert_eq!(answer[1].pages, 5);
    let written: Vec<u64> = (0..layout.data_pages()).map(|page| layout.data_gpa(page)).collect();
    let written = written.into_iter().filter(|gpa| machine.touched.contains(gpa)).collect::<Vec<_>>();
    assert_eq!(written, (20..25).map(|page| layout.data_gpa(page)).collect::<Vec<_>>());
}

#[test]
fn a_flipped_word_is_found_by_a_verification() {
    let params = probing();
    let gpa = Guest::new(&params).unwrap().layout().data_gpa(123) + 8 * 17;
    let mut flipped = false;
    let mut machine = VecMachine::with_meddle(&params, move |machine| {
        // Between the commands: the first has been answered by then.
        if machine.answers.len() == 2 && !flipped {
            flipped = true;
            machine.words(gpa, 1)[0] ^= 1 << 40;
        }
    });
    let commands = [
        ProbeCommand::new(Task::Populate, Order::Ascending),
        ProbeCommand::new(Task::Verify, Order::Random),
        ProbeCommand::new(Task::Verify, Order::Ascending),
    ];
    let answers = answers(&params, &mut machine, &commands);
    let wrong = answers.iter().map(|answer| (answer.wrong_words, answer.wrong_pages)).collect::<Vec<_>>();
    assert_eq!(wrong, [(0, 0), (1, 1), (0, 0)], "a page found wrong is put right");
}

#[test]
fn passes_without_a_number_end_with_the_window_and_a_stop_ends_any() {
    let params = probing();
    let endless = ProbeCommand { passes: 0, pages: 10, ..ProbeCommand::new(Task::Read, Order::Ascending) };
    let mut looks = 0;
    let mut machine = VecMachine::with_meddle(&params, move |machine| {
        looks += 1;
        machine.window += u64::from(looks == 500);
    });
    let answer = answers(&params, &mut machine, &[endless])[0];
    assert!((100..1000).contains(&answer.pages) && answer.pages.is_multiple_of(10), "{}", answer.pages);

    let mut looks = 0;
    let mut machine = VecMachine::with_meddle(&params, move |machine| {
        looks += 1;
        machine.stop = u64::from(looks >= 500);
    });
    let number = 1;
    machine.commands = [ProbeCommand { number, ..endless }].into();
    Guest::new(&params).unwrap().run(0, &mut machine).unwrap();
    assert_eq!(machine.answers.len(), 1, "nobody waits for the answer");
}

#[test]
fn a_command_that_means_nothing_touches_nothing_and_is_answered() {
    let params = probing();
    let mut machine = VecMachine::new(&params);
    let before = machine.words(WORKLOAD_GPA, PAGE_WORDS).to_vec();
    let command = ProbeCommand { task: 9, ..ProbeCommand::new(Task::Populate, Order::Ascending) };
    let answers = answers(&params, &mut machine, &[command]);
    assert_eq!((answers[0].number, answers[0].pages), (1, 0));
    assert_eq!(machine.words(WORKLOAD_GPA, PAGE_WORDS), before);
}
