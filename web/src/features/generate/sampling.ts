/** How text is drawn from what a model says: the settings, and their wire form. No React. */

export interface Sampling {
  temperature: number;
  topP: number;
  maxTokens: number;
  topK: number; // 0: all
  minP: number;
  repetition: number;
  presence: number;
  frequency: number;
  seed: number | null; // null: another one each time
  stop: readonly string[];
  deterministic: boolean;
}

export const DEFAULT_SAMPLING: Sampling = {
  temperature: 0.7,
  topP: 0.95,
  maxTokens: 400,
  topK: 0,
  minP: 0,
  repetition: 1,
  presence: 0,
  frequency: 0,
  seed: null,
  stop: [],
  deterministic: false,
};

/** Whether anything beyond the first three is set. */
export const hasMore = (set: Sampling): boolean => Object.keys(more(set)).length > 0;

export const wireSampling = (set: Sampling): Record<string, unknown> => ({
  temperature: set.temperature,
  top_p: set.topP,
  max_tokens: set.maxTokens,
  ...more(set),
});

/** What is as the model has it is left out. */
function more(set: Sampling): Record<string, unknown> {
  return {
    ...(set.topK > 0 ? { top_k: set.topK } : {}),
    ...(set.minP > 0 ? { min_p: set.minP } : {}),
    ...(set.repetition !== 1 ? { repetition_penalty: set.repetition } : {}),
    ...(set.presence !== 0 ? { presence_penalty: set.presence } : {}),
    ...(set.frequency !== 0 ? { frequency_penalty: set.frequency } : {}),
    ...(set.seed !== null ? { seed: set.seed } : {}),
    ...(set.stop.length > 0 ? { stop: set.stop } : {}),
    ...(set.deterministic ? { deterministic: true } : {}),
  };
}
