/** A turn of a conversation as a row to learn from. */
import type { Turn } from './conversation';

export type Row = { prompt: string; completion: string } | { messages: { role: string; content: string }[] };

/** Only this question and its answer: what was said before may hold answers that nobody has corrected. */
export function exampleOf({ question, ask }: Pick<Turn, 'question' | 'ask'>, answer: string): Row {
  if (ask.kind === 'completion') return { prompt: question, completion: answer };
  return {
    messages: [
      ...(ask.system.trim() ? [{ role: 'system', content: ask.system.trim() }] : []),
      { role: 'user', content: question },
      { role: 'assistant', content: answer.trim() },
    ],
  };
}
