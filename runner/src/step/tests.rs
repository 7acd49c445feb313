//! Whoever dies at any note, the operation comes to an end or back to its beginning.

use std::cell::{Cell, RefCell};

use super::*;

/// A journal that dies at a chosen call, as a killed process does.
#[derive(Default)]
struct Memory {
    kept: RefCell<Value>,
    /// What was told with notes.
    told: RefCell<Vec<String>>,
    calls: Cell<u32>,
    dies_at: Cell<Option<u32>>,
}

impl Journal for Memory {
    fn note(&self, _: u32, data: &Value, with: &[Change]) -> Result<()> {
        let call = self.calls.get();
        self.calls.set(call + 1);
        if self.dies_at.get() == Some(call) {
            return Err(Fail::new(Code::Terminated, "killed"));
        }
        *self.kept.borrow_mut() = data.clone();
        self.told.borrow_mut().extend(with.iter().map(|change| match change {
            Change::Told(event) => event.object.clone(),
            other => panic!("{other:?}"),
        }));
        Ok(())
    }
}

/// The world that steps change: a set of numbers. Each step adds its own; undo removes it.
type World = RefCell<Vec<u32>>;

fn plan(world: &World, fails_at: Option<u32>, final_from: u32, after_crash: AfterCrash) -> Plan<'_, Vec<u32>> {
    let mut plan = Plan::new(after_crash);
    for number in 0..5u32 {
        let run = move |work: &mut Vec<u32>| {
            if fails_at == Some(number) {
                return Err(Fail::new(Code::Capacity, "full"));
            }
            if !world.borrow().contains(&number) {
                world.borrow_mut().push(number);
            }
            work.push(number);
            Ok(())
        };
        let undo = move |_: &mut Vec<u32>| {
            world.borrow_mut().retain(|have| *have != number);
            Ok(())
        };
        plan = if number < final_from { plan.step("a", run, undo) } else { plan.final_step("b", run) };
    }
    plan
}

#[test]
fn a_failure_before_the_turn_takes_everything_back() {
    for fails_at in 0..3 {
        let world = World::default();
        let end = plan(&world, Some(fails_at), 3, AfterCrash::Back);
        let end = end.execute(Progress::new(Vec::new()), &Memory::default()).expect("the journal works");
        assert!(matches!(end, End::Undone(_, fail) if fail.code == Code::Capacity));
        assert!(world.borrow().is_empty());
    }
}

#[test]
fn a_failure_past_the_turn_stands() {
    let world = World::default();
    let end = plan(&world, Some(4), 3, AfterCrash::Back);
    let end = end.execute(Progress::new(Vec::new()), &Memory::default()).expect("the journal works");
    assert!(matches!(end, End::Stuck(_, fail) if fail.code == Code::Capacity));
    assert_eq!(*world.borrow(), [0, 1, 2, 3]);
}

#[test]
fn a_death_anywhere_ends_whole_or_not_at_all() {
    for after_crash in [AfterCrash::Back, AfterCrash::On] {
        for fails_at in [None, Some(2)] {
            // The first death at each call, and a second one at each call of the recovery.
            for (first, second) in (0..14).flat_map(|a| (0..14).map(move |b| (a, b))) {
                let world = World::default();
                let journal = Memory::default();
                let plan = plan(&world, fails_at, 3, after_crash);
                *journal.kept.borrow_mut() = serde_json::to_value(Progress::new(Vec::<u32>::new())).expect("json");
                journal.dies_at.set(Some(first));
                let mut end = plan.execute(Progress::new(Vec::new()), &journal);
                for dies_at in [Some(second), None] {
                    if end.is_ok() {
                        break;
                    }
                    journal.calls.set(0);
                    journal.dies_at.set(dies_at);
                    let at = Progress::read(journal.kept.borrow().clone()).expect("it was kept");
                    end = plan.recover(at, &journal);
                }
                match end.expect("the last recovery does not die") {
                    End::Done(_) => assert_eq!(*world.borrow(), [0, 1, 2, 3, 4]),
                    End::Undone(..) => assert!(world.borrow().is_empty(), "{first} {second}"),
                    End::Stuck(_, fail) => panic!("{fail}"),
                }
            }
        }
    }
}

#[test]
fn a_run_to_its_end_notes_each_step_but_the_last_once() {
    let (world, journal) = (World::default(), Memory::default());
    plan(&world, None, 3, AfterCrash::On).execute(Progress::new(Vec::new()), &journal).expect("the journal works");
    assert_eq!(journal.calls.get(), 4, "the end of the operation is the last one's");
}

#[test]
fn what_changes_with_a_step_is_there_exactly_if_the_step_counts() {
    let told = |name: &str| Change::Told(crate::catalogue::Event { object: name.into(), ..Default::default() });
    for dies_at in 0..5 {
        let (world, journal) = (World::default(), Memory::default());
        let both = || {
            plan(&world, None, 5, AfterCrash::On)
                .with(|work| Ok(vec![told(&format!("fifth after {}", work.len()))]))
                .final_step("c", |_| Ok(()))
        };
        *journal.kept.borrow_mut() = serde_json::to_value(Progress::new(Vec::<u32>::new())).expect("json");
        journal.dies_at.set(Some(dies_at));
        both().execute(Progress::new(Vec::new()), &journal).expect_err("it dies");
        assert!(journal.told.borrow().is_empty(), "{dies_at}: the step did not count");
        journal.dies_at.set(None);
        let at = Progress::read(journal.kept.borrow().clone()).expect("it was kept");
        assert!(matches!(both().recover(at, &journal), Ok(End::Done(_))));
        assert_eq!(*journal.told.borrow(), ["fifth after 5"], "{dies_at}");
    }
}
