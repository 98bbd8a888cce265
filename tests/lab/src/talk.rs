//! A program one talks to: lines in, lines out.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::wait::patiently;

/// A running program whose standard input and output are ours. It is killed when dropped.
#[derive(Debug)]
pub struct Talk {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Talk {
    /// Starts `command`; what it writes to standard error is ours too.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
        let output = child.stdout.take().context("stdout")?;
        let (sender, lines) = channel();
        // Ends with the program, or when nobody listens any more.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let input = child.stdin.take();
        Ok(Self { child, input, lines })
    }

    pub fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("it has been told that nothing more comes")?;
        writeln!(input, "{line}").and_then(|()| input.flush()).with_context(|| format!("saying {line:?}"))
    }

    /// The next line it writes.
    pub fn hear(&mut self, within: Duration) -> Result<String> {
        let within = patiently(within);
        self.lines.recv_timeout(within).with_context(|| format!("waited {within:?} for a line"))
    }

    /// All lines up to the first that contains `text`.
    ///
    /// # Errors
    /// With the lines, when there is none.
    pub fn hear_until(&mut self, text: &str, within: Duration) -> Result<String> {
        let within = patiently(within);
        let (due, mut all) = (Instant::now() + within, String::new());
        loop {
            let heard = self.lines.recv_timeout(due.saturating_duration_since(Instant::now()));
            let line = heard.with_context(|| format!("no {text:?} within {within:?}, but:\n{all}"))?;
            all.push_str(&line);
            all.push('\n');
            if line.contains(text) {
                return Ok(all);
            }
        }
    }

    /// The end of its input.
    pub fn finish(&mut self) {
        self.input = None;
    }

    /// Says one last line and waits until it has ended by itself.
    pub fn say_and_end(mut self, line: &str) -> Result<()> {
        self.say(line)?;
        self.finish();
        let status = self.child.wait().context("wait")?;
        ensure!(status.success(), "after {line:?}: {status}");
        Ok(())
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
