//! Parts of the agent that everything rests on: a panic in one ends the process, and pods are closed until the next agent. A panic in a
//! connection's task ends that connection.

use std::{process, thread};

struct EndsTheProcess;

impl Drop for EndsTheProcess {
    fn drop(&mut self) {
        if thread::panicking() {
            process::abort();
        }
    }
}

/// Runs something that nothing would run in the place of.
pub async fn vital<F: Future>(part: F) -> F::Output {
    let _guard = EndsTheProcess;
    part.await
}
