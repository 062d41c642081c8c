use std::path::Path;

use serde_json::{Map, Value, json};

use super::{assert_has, put, temp, text_of};
use crate::hf::ChatTemplate;

const CHATML: &str = "{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

fn template(source: &str) -> ChatTemplate {
    let special: Map<String, Value> = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone();
    ChatTemplate::new(source, Path::new("test.jinja"), special).unwrap()
}

fn render(source: &str) -> String {
    template(source).render(&talk(), false).unwrap()
}

fn talk() -> Vec<Value> {
    vec![
        json!({"role": "user", "content": "Hi"}),
        json!({"role": "assistant", "content": "Hello! 🙂"}),
        json!({"role": "user", "content": "Bye"}),
        json!({"role": "assistant", "content": "See you."}),
    ]
}

fn answers(source: &str, messages: &[Value]) -> Vec<String> {
    let rendered = template(source).render_with_spans(messages, &Value::Null).unwrap();
    rendered.assistant.iter().map(|span| rendered.text[span.range.clone()].to_string()).collect()
}

#[test]
fn renders_as_transformers_does() {
    let text = template(CHATML).render(&talk()[..1], true).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(render("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}{{ pad_token }}\n"), "<s>Hi</s>");
    // trim_blocks and lstrip_blocks: a line with only a tag leaves nothing.
    assert_eq!(render("a\n  {% if true %}\nb\n  {% endif %}\nc"), "a\nb\nc");
    assert_eq!(
        render(
            "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}{% endif %}{{ m.role[0] }}{% endfor %}"
        ),
        "uu"
    );
    assert_eq!(
        render("{{ messages[-1].content.split(' ')[-1].rstrip('.').upper() }} {{ messages[0].get('name', 'none') }}"),
        "YOU none"
    );
    assert_eq!(
        render("{{ none }} {{ true }} {{ messages[0].missing }}|{{ tools is none }} {{ documents is none }}"),
        "None True |True True"
    );
    assert_eq!(
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"),
        "4"
    );
    assert_eq!(
        render(
            "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages | length) }}{{ messages[1:3] | map(attribute='role') | join(',') }}"
        ),
        "[4]assistant,user"
    );
}

#[test]
fn json_is_printed_as_python_prints_it() {
    let value = "{% set v = {'b': [1, 2.0, none, true], 'a': '<é\"\\n>', 'e': {}, 'l': []} %}";
    assert_eq!(
        render(&format!("{value}{{{{ v | tojson }}}}")),
        r#"{"b": [1, 2.0, null, true], "a": "<é\"\n>", "e": {}, "l": []}"#
    );
    let pretty = "{\n  \"b\": [\n    1,\n    2.0,\n    null,\n    true\n  ],\n  \"a\": \"<é\\\"\\n>\",\n  \"e\": {},\n  \"l\": []\n}";
    assert_eq!(render(&format!("{value}{{{{ v | tojson(indent=2) }}}}")), pretty);
    assert_eq!(render(&format!("{value}{{{{ v | tojson(2) }}}}")), pretty);
    let compact =
        render(&format!("{value}{{{{ v | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}}}"));
    assert_eq!(compact, r#"{"a":"<\u00e9\"\n>","b":[1,2.0,null,true],"e":{},"l":[]}"#);
    assert_eq!(render("{{ '🙂' | tojson(ensure_ascii=true) }}"), r#""\ud83d\ude42""#);
    // The order of keys in a message is kept.
    let messages = [json!({"role": "tool", "content": {"z": 1, "a": [2]}})];
    assert_eq!(
        template("{{ messages[0].content | tojson }}").render(&messages, false).unwrap(),
        r#"{"z": 1, "a": [2]}"#
    );
}

#[test]
fn tools_reach_the_template() {
    let tools = json!([{"type": "function", "function": {"name": "add"}}]);
    let text = template("{% for tool in tools %}{{ tool.function.name }}{% endfor %}")
        .render_with_tools(&talk(), false, &tools)
        .unwrap();
    assert_eq!(text, "add");
}

#[test]
fn the_date_can_be_fixed() {
    let mut dated = template("{{ strftime_now('%Y') }}");
    assert!(dated.uses_date());
    dated.set_now(1_000_000_000);
    assert_eq!(dated.render(&[], false).unwrap(), "2001");
    assert_has(&text_of(template("{{ strftime_now('%Q') }}").render(&[], false)), &["bad format `%Q`"]);
}

#[test]
fn errors_name_the_file_and_the_reason() {
    let text = text_of(ChatTemplate::new("{% for %}", Path::new("model/chat_template.jinja"), Map::new()));
    assert_has(&text, &["chat template of model/chat_template.jinja", "syntax error", "hint:"]);
    let source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}";
    let text = text_of(template(source).render(&[json!({"role": "system", "content": "x"})], false));
    assert_has(&text, &["test.jinja", "System role not supported", "hint: check the roles"]);
    assert_has(&text_of(template("{{ messages[0].a.b }}").render(&talk(), false)), &["undefined"]);
}

#[test]
fn the_folder_decides_which_template() {
    let folder = temp();
    assert!(ChatTemplate::from_folder(folder.path()).unwrap().is_none());
    let named = json!({"eos_token": {"content": "</s>"}, "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]});
    put(folder.path(), &[("tokenizer_config.json", &named.to_string())]);
    assert_eq!(ChatTemplate::from_folder(folder.path()).unwrap().unwrap().render(&[], false).unwrap(), "D</s>");
    put(folder.path(), &[("chat_template.json", r#"{"chat_template": "J{{ eos_token }}"}"#)]);
    assert_eq!(ChatTemplate::from_folder(folder.path()).unwrap().unwrap().render(&[], false).unwrap(), "J</s>");
    put(
        folder.path(),
        &[("chat_template.jinja", "F{{ eos_token }}"), ("special_tokens_map.json", r#"{"bos_token": "<s>"}"#)],
    );
    let template = ChatTemplate::from_folder(folder.path()).unwrap().unwrap();
    assert_eq!((template.render(&[], false).unwrap().as_str(), template.source()), ("F</s>", "F{{ eos_token }}"));
    put(folder.path(), &[("tokenizer_config.json", "{")]);
    assert_has(&text_of(ChatTemplate::from_folder(folder.path())), &["tokenizer_config.json: not valid JSON"]);
}

#[test]
fn answers_include_the_end_of_turn() {
    assert_eq!(answers(CHATML, &talk()), ["Hello! 🙂<|im_end|>", "See you.<|im_end|>"]);
    let rendered = template(CHATML).render_with_spans(&talk(), &Value::Null).unwrap();
    assert_eq!(rendered.text, template(CHATML).render(&talk(), false).unwrap());
    assert_eq!(rendered.assistant.iter().map(|span| span.message).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(answers(CHATML, &talk()[..1]), Vec::<String>::new());

    let bracketed = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}";
    assert_eq!(answers(bracketed, &talk()), [" Hello! 🙂</s>", " See you.</s>"]);

    // Without a token that ends a turn, the white space does.
    let bare = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    assert_eq!(answers(bare, &talk()), ["Hello! 🙂\n\n", "See you.\n\n"]);
}

#[test]
fn generation_tags_are_accepted() {
    let marked = CHATML
        .replace("{{- '<|im_start|>' + message", "{%- generation %}{{- '<|im_start|>' + message")
        .replace("{%- endfor", "{%- endgeneration %}\n{%- endfor");
    assert_eq!(template(&marked).render(&talk(), true).unwrap(), template(CHATML).render(&talk(), true).unwrap());
}

/// Drops the thoughts of every answer but the last, and gives the last one empty thoughts.
const THINKING: &str = "{% for m in messages %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- if m.role == 'assistant' and loop.last %}{%- set content = '<think>\\n\\n</think>\\n\\n' + content %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

#[test]
fn templates_that_treat_the_last_answer_apart_are_read() {
    let mut messages = talk();
    messages[1]["content"] = json!("<think>\nA greeting.\n</think>\n\nHello!");
    assert_eq!(answers(THINKING, &messages), ["Hello!<|im_end|>", "<think>\n\n</think>\n\nSee you.<|im_end|>"]);
    // Two answers that end alike, or are empty, are not mixed up.
    messages[1]["content"] = json!("Same");
    messages[3]["content"] = json!("Same");
    assert_eq!(answers(THINKING, &messages), ["Same<|im_end|>", "<think>\n\n</think>\n\nSame<|im_end|>"]);
    messages[1]["content"] = json!("");
    assert_eq!(answers(THINKING, &messages)[0], "<|im_end|>");
}

#[test]
fn prompts_that_open_a_thought_are_read() {
    let opening = THINKING.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif");
    assert_ne!(opening, THINKING);
    // Earlier turns have no thought to open, so their answer is the content alone.
    assert_eq!(answers(&opening, &talk()), ["Hello! 🙂<|im_end|>", "\n</think>\n\nSee you.<|im_end|>"]);
}

#[test]
fn a_system_message_that_moves_is_followed() {
    let moving = "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}{% endif %}{% endfor %}
{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1].content %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}{% if m.content == last %}{{ ns.system }}{% endif %}{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}";
    let mut messages = talk();
    messages.insert(0, json!({"role": "system", "content": "Be kind."}));
    let text = template(moving).render(&messages, false).unwrap();
    assert_eq!(text, "[INST]Hi[/INST] Hello! 🙂</s>[INST]Be kind.\n\nBye[/INST] See you.</s>");
    assert_eq!(answers(moving, &messages), [" Hello! 🙂</s>", " See you.</s>"]);
}

#[test]
fn unstable_templates_name_the_message() {
    let growing = "{% for m in messages %}<{{ m.content }}{{ messages | length }}>{% endfor %}";
    let text = text_of(template(growing).render_with_spans(&talk(), &Value::Null));
    assert_has(&text, &["not prefix-stable at message 1", "renders differently once other messages follow", "hint:"]);
    let dropping = "{% for m in messages %}{% if m.role != 'assistant' %}<{{ m.content }}>{% endif %}{% endfor %}";
    let text = text_of(template(dropping).render_with_spans(&talk(), &Value::Null));
    assert_has(&text, &["not prefix-stable at message 1"]);
}
