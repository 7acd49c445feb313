//! Who is served when, by one thread.

use std::sync::mpsc;

use super::*;

/// A pool of one thread that does nothing until it is let go, and where it tells what it did.
fn held() -> (Pool, mpsc::Sender<()>, mpsc::Sender<u64>, mpsc::Receiver<u64>) {
    let pool = Pool::new("test", 1, 1);
    let (go, wait) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    pool.submit(LaneId(1000), Box::new(move |_| wait.recv().unwrap_or_default()));
    // Taken before anything else is queued.
    while pool.shared.state.lock().queued > 0 {
        thread::yield_now();
    }
    (pool, go, tell, told)
}

fn note(pool: &Pool, lane: u64, tell: &mpsc::Sender<u64>) {
    let tell = tell.clone();
    pool.submit(LaneId(lane), Box::new(move |_| tell.send(lane).unwrap_or_default()));
}

#[test]
fn lanes_take_turns() {
    let (pool, go, tell, told) = held();
    for lane in 0..4 {
        (0..50).for_each(|_| note(&pool, lane, &tell));
    }
    go.send(()).expect("go");
    let order: Vec<u64> = told.iter().take(200).collect();
    for (at, round) in order.chunks(4).enumerate() {
        let mut lanes = round.to_vec();
        lanes.sort_unstable();
        // The first rounds bring everybody's first job and second jobs of some.
        assert!(!(3..=45).contains(&at) || lanes == [0, 1, 2, 3], "round {at}: {round:?}");
    }
}

/// A client that asks again only when it has its answer, always from within another's job: nothing runs meanwhile.
fn ask(pool: &Arc<Pool>, tell: &mpsc::Sender<u64>, left: usize) {
    let (me, told) = (Arc::clone(pool), tell.clone());
    let answer = move |_: &mut Scratch| {
        told.send(999).unwrap_or_default();
        if left > 1 {
            ask(&me, &told, left - 1);
        }
    };
    pool.submit(LaneId(999), Box::new(answer));
}

#[test]
fn who_asks_for_little_waits_for_one_job() {
    const CROWD: u32 = 60;
    let (pool, go, tell, told) = held();
    for lane in 0..u64::from(CROWD) {
        (0..100).for_each(|_| note(&pool, lane, &tell));
    }
    let again = Arc::new(pool);
    ask(&again, &tell, 40);
    go.send(()).expect("go");
    let order: Vec<u64> = told.iter().take(320).collect();
    let turns: Vec<usize> = order.iter().enumerate().filter(|(_, lane)| **lane == 999).map(|(at, _)| at).collect();
    assert_eq!(turns.len(), 40, "all of them, while the crowd has thousands of jobs left");
    for pair in turns.windows(2) {
        assert!(pair[1] - pair[0] <= 2, "{} jobs of others in between", pair[1] - pair[0] - 1);
    }
}

#[test]
fn a_crowd_of_newcomers_does_not_stop_those_that_work() {
    let (pool, go, tell, told) = held();
    (0..100).for_each(|_| note(&pool, 1, &tell));
    // Churn: each lane with a single job.
    (0..100).for_each(|n| note(&pool, 2000 + n, &tell));
    go.send(()).expect("go");
    let order: Vec<u64> = told.iter().take(100).collect();
    let worked = order.iter().filter(|lane| **lane == 1).count();
    assert!((45..=55).contains(&worked), "{worked} of the first hundred");
}
