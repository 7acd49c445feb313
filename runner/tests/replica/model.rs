//! Random operations on a replica, with a death at any note of the journal: what is not possible is refused and changes
//! nothing, whatever dies is brought to an end, and every byte is where it should be.

use std::time::Duration;

use aquifer_runner::{
    fail::{Code, Fail},
    failback::{Changed, commit, failback, give_back, switchover},
    failover::{failover, permanent, undo},
    replica::{
        desk::Desk,
        model::{HomeKind, Switch},
        recover::recover,
        run::{Ran, replicate},
        state::{Op, State},
    },
    source::PointRef,
};
use jiff::Timestamp;

use crate::stage::{Dice, Disks, REPLICA, Stage, scribble};

const OPS: [Op; 8] =
    [Op::Replicate, Op::Failover, Op::Undo, Op::Permanent, Op::Failback, Op::Switchover, Op::Commit, Op::Replicate];

fn act(stage: &Stage, desk: &Desk<'_>, op: Op, dice: &mut Dice) -> Result<bool, Fail> {
    let state = desk.load(REPLICA).map_or(State::Absent, |row| row.record.state);
    match op {
        Op::Replicate => match replicate(desk, &stage.spec())? {
            Ran::OnHold(state) => {
                assert!(state.holds_replication(), "{state}");
                return Ok(false);
            }
            Ran::Made(_) | Ran::NoNewPoint => {}
        },
        Op::Failover => {
            let back = dice.below(2).min((stage.points().len() as u64).saturating_sub(1));
            failover(desk, REPLICA, &PointRef::Latest(back as u32), None, true)?;
        }
        Op::Undo if matches!(state, State::Failback | State::ReadyToSwitch) => give_back(desk, REPLICA, false)?,
        Op::Undo => undo(desk, REPLICA, false)?,
        Op::Permanent => permanent(desk, REPLICA)?,
        Op::Failback => {
            failback(desk, REPLICA, stage.home(HomeKind::Original), Switch::Manual, Changed::default())?;
        }
        Op::Switchover => {
            switchover(desk, REPLICA, true, Duration::ZERO)?;
        }
        Op::Commit => commit(desk, REPLICA, false)?,
        Op::Verify | Op::PlannedFailover | Op::Remove | Op::Start => {}
    }
    Ok(true)
}

/// What the world must look like in a state.
fn check(stage: &Stage, serving: &Disks) {
    let record = stage.at(|desk| desk.load(REPLICA)).expect("load").record;
    let folder = record.folder.clone();
    let replica_on = stage.host.files(&folder).is_some();
    assert!(stage.at(|desk| desk.check_stamp(&record)).is_ok() || record.state.is_final());
    match record.state {
        State::Ready | State::Absent => assert!(!replica_on, "{}", record.state),
        State::Failover | State::ReadyToSwitch => {
            let files = stage.host.files(&folder).expect("the replica is on");
            for (file, (_, bytes)) in files.iter().zip(serving) {
                stage.assert_file(file, aquifer_formats::probe::Format::Qcow2, bytes, record.state.name());
            }
        }
        State::Failback => {
            assert!(!replica_on, "both sides are on");
            stage.assert_production(serving, "failback");
        }
        State::Processing | State::Verifying => panic!("{} is no state to rest in", record.state),
        State::FailedFailover | State::PermanentFailover | State::Removed => {}
    }
}

fn life(seed: u64) {
    let mut stage = Stage::new();
    stage.options.keep = 3;
    let mut dice = Dice::new(seed);
    let mut disks: Disks = vec![("vda".into(), vec![1; 300_032]), ("vdb".into(), vec![2; 131_072])];
    stage.put_production(&disks);
    let mut truth: Vec<(Timestamp, Disks)> = Vec::new();
    let mut serving = disks.clone();
    let mut hour = 0;
    for _ in 0..14 {
        // A backup of whoever serves; what it holds is known.
        if dice.below(2) == 0 || truth.is_empty() {
            hour += 1;
            let taken = Timestamp::now().checked_add(jiff::Span::new().hours(hour)).expect("a time");
            disks.iter_mut().for_each(|(_, bytes)| {
                scribble(bytes, 1, &mut dice);
            });
            stage.back_up("r1", &disks, truth.is_empty(), taken);
            truth.push((taken, disks.clone()));
        }
        let op = OPS[dice.below(OPS.len() as u64) as usize];
        let before = stage.at(|desk| desk.load(REPLICA)).ok();
        let state = before.as_ref().map_or(State::Absent, |row| row.record.state);
        let legal = state.step(op).is_ok();
        let dies = dice.below(2) == 0;
        *stage.dies_after.lock() = dies.then(|| dice.below(14) as u32);
        let mut done = stage.at(|desk| act(&stage, desk, op, &mut dice));
        let died = *stage.dies_after.lock() == Some(0) && done.is_err();
        *stage.dies_after.lock() = None;
        if died && legal {
            // Whoever comes next brings it to an end, perhaps dying once more.
            *stage.dies_after.lock() = Some(dice.below(8) as u32);
            let _ = stage.at(|desk| recover(desk, REPLICA));
            *stage.dies_after.lock() = None;
            stage.at(|desk| if desk.load(REPLICA).is_ok() { recover(desk, REPLICA) } else { Ok(()) }).expect("an end");
            done = Ok(true);
        }
        if !legal && op != Op::Replicate {
            let fail = done.as_ref().expect_err("not possible");
            assert!(matches!(fail.code, Code::State | Code::NotFound), "{fail}");
            let after = stage.at(|desk| desk.load(REPLICA)).ok();
            assert_eq!(after.map(|row| row.record), before.map(|row| row.record), "{op} in {state} changed something");
        } else if let Err(fail) = &done {
            panic!("{op} in {state}: {fail}");
        }
        let Ok(row) = stage.at(|desk| desk.load(REPLICA)) else { continue };
        let now = row.record;
        for point in stage.points() {
            if let Some((_, disks)) = truth.iter().find(|(taken, _)| *taken == point.taken) {
                stage.assert_point(&point, disks);
            }
        }
        if now.state == State::Failover && !matches!(state, State::Failover | State::ReadyToSwitch | State::Failback) {
            let failover = now.failover.as_ref().expect("a record");
            let point = stage.points().into_iter().find(|point| point.id == failover.point).expect("its point");
            let known = truth.iter().find(|(taken, _)| *taken == point.taken).map(|(_, disks)| disks.clone());
            serving = known.unwrap_or_else(|| serving.clone());
        }
        check(&stage, &serving);
        if matches!(now.state, State::Failover | State::ReadyToSwitch) {
            stage.guest_writes(&now.folder, &mut serving, 1, &mut dice);
        }
        if state == State::Failback && now.state == State::Ready {
            disks.clone_from(&serving);
            let latest = stage.points().pop().expect("the point before the change of sides");
            truth.push((latest.taken, serving.clone()));
            stage.host.power_off_all();
        }
        if now.state.is_final() {
            return;
        }
    }
}

#[test]
fn whatever_dies_there_is_a_way_on() {
    let scale: u64 = std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    for seed in 0..12 * scale {
        life(seed + 1);
    }
}
