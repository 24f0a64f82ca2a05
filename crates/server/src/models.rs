//! `GET /v1/models` (`api.md` section 3): one body for both dialects.

use crate::app::App;
use serde_json::{Value, json};

/// Names by which the model thinks or does not.
const ALIASES: [&str; 2] = ["deepseek-chat", "deepseek-reasoner"];

fn model(app: &App, id: &str) -> Value {
    let context = app.context();
    json!({
        "id": id, "object": "model", "created": 1_767_225_600, "owned_by": "ds4", "type": "model",
        "display_name": app.options.display_name, "created_at": "2026-01-01T00:00:00Z", "lifecycle": "active",
        "max_input_tokens": context, "max_tokens": context, "context_length": context, "max_model_len": context,
    })
}

/// All models: the one.
pub(crate) fn list(app: &App) -> Value {
    let id = &app.options.model;
    json!({"object": "list", "has_more": false, "first_id": id, "last_id": id, "data": [model(app, id)]})
}

/// The model of a name.
pub(crate) fn find(app: &App, id: &str) -> Option<Value> {
    (id == app.options.model || ALIASES.contains(&id)).then(|| model(app, id))
}
