import type { Batch } from '@/types/api';

const MOST = 512; // characters of a value of `metadata`

/** The name of its file, which the page notes where OpenAI's examples have a description too. */
export const nameOf = (batch: Batch): string | undefined => batch.metadata?.['description'];

export const named = (filename: string): Record<string, string> => ({ description: filename.slice(0, MOST) });
