//! Figures for Prometheus.

use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Which answers are counted together.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    endpoint: String,
    status: u16,
}

/// All figures.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    pub(crate) prompt_tokens: Counter,
    pub(crate) cached_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) cancelled: Counter,
    pub(crate) running: Gauge,
    pub(crate) queued: Gauge,
    pub(crate) live_tokens: Gauge,
    pub(crate) kv_bytes: Gauge,
    pub(crate) first_token: Histogram,
    pub(crate) between_tokens: Histogram,
    pub(crate) prefill_rate: Histogram,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let metrics = Metrics {
            registry: Registry::with_prefix("ds4"),
            requests: Family::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            cancelled: Counter::default(),
            running: Gauge::default(),
            queued: Gauge::default(),
            live_tokens: Gauge::default(),
            kv_bytes: Gauge::default(),
            first_token: Histogram::new(exponential_buckets(0.01, 2.0, 16)),
            between_tokens: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            prefill_rate: Histogram::new(exponential_buckets(10.0, 2.0, 14)),
        };
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let r = &mut self.registry;
        r.register("requests", "HTTP requests answered", self.requests.clone());
        r.register("prompt_tokens", "Tokens of prompts", self.prompt_tokens.clone());
        r.register("cached_tokens", "Tokens of prompts whose state was there", self.cached_tokens.clone());
        r.register("generated_tokens", "Tokens generated", self.generated_tokens.clone());
        r.register("cancelled", "Requests whose clients went away", self.cancelled.clone());
        r.register("requests_running", "Requests that are computed", self.running.clone());
        r.register("requests_queued", "Requests that wait", self.queued.clone());
        r.register("live_tokens", "Tokens whose state is in memory", self.live_tokens.clone());
        r.register("kv_bytes", "Bytes of memory for the state of conversations", self.kv_bytes.clone());
        let seconds = || Unit::Seconds;
        r.register_with_unit(
            "time_to_first_token",
            "From the request to the first token",
            seconds(),
            self.first_token.clone(),
        );
        r.register_with_unit(
            "inter_token",
            "Between tokens of an answer, its mean",
            seconds(),
            self.between_tokens.clone(),
        );
        r.register("prefill_tokens_per_second", "Speed of computing a prompt", self.prefill_rate.clone());
        self
    }

    /// Counts an answer.
    pub(crate) fn answered(&self, endpoint: &str, status: u16) {
        self.requests.get_or_create(&Answered { endpoint: endpoint.to_owned(), status }).inc();
    }

    /// All figures as text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
