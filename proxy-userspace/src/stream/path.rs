//! The stream path at work.

use tokio::sync::mpsc;

use super::{Change, Options, StreamCommand, StreamError, Streams, meter::Reader};

/// Serves nothing yet.
#[derive(Debug)]
pub struct StreamPath {
    pub commands: mpsc::Sender<StreamCommand>,
    pub reader: Reader,
}

impl StreamPath {
    pub fn start(_options: Options) -> Result<Self, StreamError> {
        let (commands, _) = mpsc::channel(1);
        Ok(Self { commands, reader: Reader::default() })
    }
}

impl Streams for StreamPath {
    type Prepared = ();

    fn prepare(&mut self, _change: Change) -> Result<(), StreamError> {
        Ok(())
    }

    fn commit(&mut self, (): ()) {}

    async fn stop(self) {}
}
