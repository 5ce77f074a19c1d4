import { CopyText } from '@/components/CopyText';
import { modelsQuery } from '@/features/generate/queries';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { exampleOf } from './example';

/** Two lines that could be sent as they are, with a model that is there. */
export function Example() {
  const { t } = useTranslation();
  const models = useQuery(modelsQuery).data ?? [];
  const model = models.find((each) => each.family !== 'sd')?.id ?? 'SmolLM2-135M-Instruct';
  return <CopyText text={exampleOf(model)} label={t('batches.format')} />;
}
