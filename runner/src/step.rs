//! Journalled steps: how an operation with many effects survives the death of whoever carries it out.
//!
//! An operation is a list of idempotent steps over a record of what is known so far. Before and after each step the
//! record goes to a [`Journal`]. Whoever finds an operation there that nobody carries out builds the same list again
//! and goes on: forward from its point of no return on, back before it (or forward, where the plan says so).
//!
//! Invariants
//! - No step runs before the journal has it; no step counts before the journal has that. One note says both: that a step
//!   is done, and that the next one may have begun. Whoever begins an operation notes its beginning, and whoever ends it
//!   its end: a note that changes nothing would be a durable write for nothing.
//! - What a step changes in the journal's own store is changed by its note, wholly or not at all ([`Plan::with`]).
//! - A journal that refuses ends everything at once, with no further effect: its refusal means that this process may
//!   not be the one that carries out the operation any more.
//! - A step that fails before the point of no return takes back itself and all before it, in reverse.
//!
//! Not here: what the steps do; where a journal is kept.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    catalogue::Change,
    fail::{Code, Fail, Result},
};

/// Which way an operation goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Going {
    /// To its end.
    #[default]
    Forward,
    /// Back to where it began.
    Back,
}

/// Where an operation stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress<W> {
    /// Number of the step that is next, either way.
    pub cursor: u32,
    /// Which way it goes.
    #[serde(default)]
    pub going: Going,
    /// Why it goes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<(String, String)>,
    /// What is known so far.
    pub work: W,
}

impl<W> Progress<W> {
    /// The beginning.
    pub fn new(work: W) -> Self {
        Self { cursor: 0, going: Going::Forward, because: None, work }
    }

    /// From what a journal kept.
    ///
    /// # Errors
    /// [`Code::Corrupt`] for a record of another shape.
    pub fn read(data: Value) -> Result<Self>
    where
        W: DeserializeOwned,
    {
        serde_json::from_value(data)
            .map_err(|e| Fail::new(Code::Corrupt, "the record of an operation cannot be read").cause(e))
    }
}

/// Where the progress of one operation is kept.
pub trait Journal {
    /// Keeps `data` as where the operation stands: step `cursor` is next. `with` is changed at the same moment.
    ///
    /// # Errors
    /// It cannot be kept, or the operation is no longer ours.
    fn note(&self, cursor: u32, data: &Value, with: &[Change]) -> Result<()>;
}

/// What a step does.
pub type Effect<'a, W> = Box<dyn Fn(&mut W) -> Result<()> + 'a>;

/// What changes with the note that a step is done.
type With<'a, W> = Box<dyn Fn(&W) -> Result<Vec<Change>> + 'a>;

/// One step.
pub struct Step<'a, W> {
    name: &'static str,
    run: Effect<'a, W>,
    undo: Effect<'a, W>,
    with: Option<With<'a, W>>,
}

/// What becomes of an operation that died before its point of no return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterCrash {
    /// It is taken back.
    Back,
    /// It is finished.
    On,
}

/// The steps of an operation.
pub struct Plan<'a, W> {
    steps: Vec<Step<'a, W>>,
    turn: usize,
    after_crash: AfterCrash,
}

/// How it ended.
#[derive(Debug)]
pub enum End<W> {
    /// Every step was done.
    Done(W),
    /// It failed before its point of no return and everything was taken back.
    Undone(W, Fail),
    /// It failed past its point of no return, or could not be taken back: it stands where it is.
    Stuck(W, Fail),
}

impl<'a, W: Serialize> Plan<'a, W> {
    /// An operation without steps.
    pub fn new(after_crash: AfterCrash) -> Self {
        Self { steps: Vec::new(), turn: 0, after_crash }
    }

    /// Adds a step that can be taken back. Both must do no harm when done twice, or after half of themselves.
    #[must_use]
    pub fn step(
        mut self,
        name: &'static str,
        run: impl Fn(&mut W) -> Result<()> + 'a,
        undo: impl Fn(&mut W) -> Result<()> + 'a,
    ) -> Self {
        self.steps.push(Step { name, run: Box::new(run), undo: Box::new(undo), with: None });
        self.turn = self.steps.len();
        self
    }

    /// Adds a step that is never taken back. All that were added before it are the way to the point of no return.
    #[must_use]
    pub fn final_step(mut self, name: &'static str, run: impl Fn(&mut W) -> Result<()> + 'a) -> Self {
        self.steps.push(Step { name, run: Box::new(run), undo: Box::new(|_| Ok(())), with: None });
        self
    }

    /// Lets the note that the step added last is done change something besides. It is asked again where the step is
    /// done again.
    #[must_use]
    pub fn with(mut self, changes: impl Fn(&W) -> Result<Vec<Change>> + 'a) -> Self {
        if let Some(step) = self.steps.last_mut() {
            step.with = Some(Box::new(changes));
        }
        self
    }

    /// The same, with another answer to what becomes of it after a death.
    #[must_use]
    pub fn after_crash(self, after_crash: AfterCrash) -> Self {
        Self { after_crash, ..self }
    }

    /// The names of its steps.
    pub fn names(&self) -> Vec<&'static str> {
        self.steps.iter().map(|step| step.name).collect()
    }

    /// Goes on with an operation that nobody carries out any more.
    ///
    /// # Errors
    /// As [`Plan::execute`].
    pub fn recover(&self, mut at: Progress<W>, journal: &dyn Journal) -> Result<End<W>> {
        let before_turn = (at.cursor as usize) < self.turn;
        if at.going == Going::Forward && before_turn && self.after_crash == AfterCrash::Back {
            let fail = Fail::new(Code::Failed, "whoever carried out the operation died; it was taken back");
            turn_back(&mut at, &fail);
        }
        self.execute(at, journal)
    }

    /// Carries it out from where it stands, which the journal knows.
    ///
    /// # Errors
    /// The journal's: nothing was done after it refused.
    pub fn execute(&self, mut at: Progress<W>, journal: &dyn Journal) -> Result<End<W>> {
        let mut why = None;
        while at.going == Going::Forward {
            let Some(step) = self.steps.get(at.cursor as usize) else { return Ok(End::Done(at.work)) };
            match (step.run)(&mut at.work).and_then(|()| step.changes(&at.work)) {
                Ok(with) => {
                    at.cursor += 1;
                    // Of the last step the end of the operation tells.
                    if (at.cursor as usize) < self.steps.len() || !with.is_empty() {
                        note(&at, &with, journal)?;
                    }
                }
                Err(fail) if (at.cursor as usize) < self.turn => {
                    turn_back(&mut at, &fail);
                    why = Some(fail);
                }
                Err(fail) => return Ok(End::Stuck(at.work, fail)),
            }
        }
        // What failed under our own eyes is told whole, with where it was and what helps.
        let because = why.unwrap_or_else(|| {
            let (code, what) = at.because.clone().unwrap_or_default();
            Fail::new(Code::find(&code).unwrap_or(Code::Failed), what)
        });
        self.back(at, because, journal)
    }

    fn back(&self, mut at: Progress<W>, because: Fail, journal: &dyn Journal) -> Result<End<W>> {
        loop {
            // Which way it goes is known before anything is taken back.
            note(&at, &[], journal)?;
            // The step at the cursor may be half done, so it is taken back as well.
            if let Some(step) = self.steps.get(at.cursor as usize)
                && let Err(fail) = (step.undo)(&mut at.work)
            {
                return Ok(End::Stuck(at.work, fail));
            }
            if at.cursor == 0 {
                return Ok(End::Undone(at.work, because));
            }
            at.cursor -= 1;
        }
    }
}

impl<W> Step<'_, W> {
    fn changes(&self, work: &W) -> Result<Vec<Change>> {
        self.with.as_ref().map_or_else(|| Ok(Vec::new()), |with| with(work))
    }
}

fn turn_back<W>(at: &mut Progress<W>, fail: &Fail) {
    at.going = Going::Back;
    at.because = Some((fail.code.name().to_owned(), fail.what.clone()));
}

fn note<W: Serialize>(at: &Progress<W>, with: &[Change], journal: &dyn Journal) -> Result<()> {
    let data = serde_json::to_value(at).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    journal.note(at.cursor, &data, with)
}

#[cfg(test)]
mod tests;
