"""The Space of the judge: one image and one answer in, scores out.

The visitor's own API key is used, and neither it nor the answer is kept.
"""

from pathlib import Path

import evaluate
import gradio as gr

judge = evaluate.load(str(Path(__file__).with_name("judge.py")))


def score(image, prediction, task, question, reference, model, base_url, api_key, hardened):
    """Scores of one answer as a dict; `gr.Error` with one sentence where there are none."""
    if image is None:
        raise gr.Error("Give an image first.")
    if not (prediction or "").strip():
        raise gr.Error("Give an answer to score; an empty one scores 0 without asking.")
    if not (api_key or base_url):
        raise gr.Error("Give your API key, or the address of a server of your own.")
    try:
        result = judge.compute(
            predictions=[prediction],
            images=[image],
            references=[reference],
            questions=[question],
            task=task,
            model=model,
            base_url=base_url or "https://api.openai.com/v1",
            api_key=api_key or "none",
            hardened=hardened,
            store=None,
            max_retries=2,
            max_wait=60.0,
        )
    except Exception as error:  # JudgeError and ValueError: one sentence each
        raise gr.Error(str(error)) from None
    if result["reasons"][0]:
        raise gr.Error(f"Not scored: {result['reasons'][0]}")
    names = ("judge_models", "tokens", "cost_usd", "hardened", "task")
    return {
        "accuracy": result["accuracy_scores"][0],
        "hallucination": result["hallucination_scores"][0],
        **{name: result[name] for name in names},
    }


demo = gr.Interface(
    score,
    inputs=[
        gr.Image(type="pil", label="Image"),
        gr.Textbox(lines=5, label="Answer to score"),
        gr.Radio(["reasoning", "vqa", "caption"], value="reasoning", label="Task"),
        gr.Textbox(label="Question (vqa)"),
        gr.Textbox(label="Reference (vqa, caption)"),
        gr.Textbox(value="gpt-4o", label="Judge"),
        gr.Textbox(label="Server, where it is not OpenAI's"),
        gr.Textbox(type="password", label="Your API key (used for this request, not kept)"),
        gr.Checkbox(value=True, label="Hardened against instructions in the answer (off: the paper's prompt alone)"),
    ],
    outputs=gr.JSON(label="Scores, 0-100"),
    title="Granulon judge",
    description="Accuracy and hallucination of an answer about an image, as a multimodal model sees them.",
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
