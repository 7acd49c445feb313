//! What a door had in hand when it died is known to the next one.

use super::*;

const DISK: Identity = [7; 16];

fn marks() -> (Inflight, (File, u64, u64)) {
    let (inflight, file, len) = Inflight::create(&std::env::temp_dir(), (2, 8), DISK).expect("memory");
    (inflight, (file, 0, len))
}

fn again(place: &(File, u64, u64)) -> Inflight {
    let (file, offset, len) = place;
    Inflight::open((file.try_clone().expect("a descriptor"), *offset, *len), 2, 8, DISK).expect("the same memory")
}

#[test]
fn what_was_taken_and_not_answered_comes_back_in_order() {
    let (inflight, place) = marks();
    for (turn, head) in [(1, 5), (2, 0), (3, 7), (4, 2)] {
        inflight.taken(1, head, turn).expect("marked");
    }
    inflight.answering(1, 0).and_then(|()| inflight.answered(1, 0, 1)).expect("unmarked");
    drop(inflight);
    assert_eq!(again(&place).recover(1, 1).expect("recovered"), (vec![5, 7, 2], 4));
    assert_eq!(again(&place).recover(0, 0).expect("the other queue"), (vec![], 0));
}

#[test]
fn a_death_between_answer_and_mark_is_told_by_the_ring() {
    let (inflight, place) = marks();
    inflight.taken(0, 3, 1).and_then(|()| inflight.taken(0, 4, 2)).expect("marked");
    inflight.answering(0, 3).expect("noted");
    drop(inflight);
    // The answer is in the ring, whose index says so; its mark was not reached.
    assert_eq!(again(&place).recover(0, 1).expect("recovered"), (vec![4], 2));

    let (inflight, place) = marks();
    inflight.taken(0, 3, 1).and_then(|()| inflight.answering(0, 3)).expect("marked");
    drop(inflight);
    // The answer never got into the ring.
    assert_eq!(again(&place).recover(0, 0).expect("recovered"), (vec![3], 1));
}

#[test]
fn strangers_memory_is_refused() {
    let (_, (file, offset, len)) = marks();
    let open = |len, queues, size, disk| {
        Inflight::open((file.try_clone().expect("a descriptor"), offset, len), queues, size, disk)
    };
    assert!(matches!(open(len, 2, 8, [8; 16]), Err(Refused::OtherDisk)));
    assert!(matches!(open(len - 1, 2, 8, DISK), Err(Refused::Shape(2, 8))));
    assert!(matches!(open(1 << 20, 2, 8, DISK), Err(Refused::Memory(MemoryError::Short(_)))), "longer than its file");
    let inflight = open(len, 2, 8, DISK).expect("the right one");
    assert!(inflight.taken(2, 0, 1).is_err() && inflight.taken(0, 8, 1).is_err(), "no such queue, no such place");
}
