/** What the generate screen is set to: model, dials, sampling, system prompt. Kept for this tab. */
import { useSyncExternalStore } from 'react';
import type { Sampling } from './conversation';
import { NEUTRAL, type DialValues } from './dials';

export interface Settings {
  model: string | null;
  dials: DialValues;
  sampling: Sampling;
  system: string;
}

const STORED = 'fine-generate';
export const DEFAULT_SAMPLING: Sampling = { temperature: 0.7, topP: 0.95, maxTokens: 400 };
const DEFAULTS: Settings = { model: null, dials: NEUTRAL, sampling: DEFAULT_SAMPLING, system: '' };

let settings: Settings = load();
const listeners = new Set<() => void>();

export function useSettings(): Settings {
  return useSyncExternalStore(
    (listener) => {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    () => settings,
  );
}

export function setSettings(fields: Partial<Settings>): void {
  settings = { ...settings, ...fields };
  try {
    sessionStorage.setItem(STORED, JSON.stringify(settings));
  } catch {
    // Then they hold until the page is left.
  }
  for (const listener of listeners) listener();
}

/** The system prompt and the model's name are their user's, as the conversation is. */
export const forgetSettings = (): void => setSettings(DEFAULTS);

function load(): Settings {
  try {
    return { ...DEFAULTS, ...(JSON.parse(sessionStorage.getItem(STORED) ?? '{}') as Partial<Settings>) };
  } catch {
    return DEFAULTS;
  }
}
