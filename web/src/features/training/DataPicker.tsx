import { CopyText } from '@/components/CopyText';
import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { FilePicker } from '@/features/files/FilePicker';
import css from '@/features/files/FilePicker.module.css';
import { isZip, type Picked } from '@/features/files/gather';
import { useUpload } from '@/features/files/useUpload';
import type { DataKind } from '@/types/api';
import { Alert, Text } from '@mantine/core';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { GatherPictures } from './GatherPictures';

const EXAMPLE = `{"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Arr, I be fine!"}]}
{"instruction": "Add.", "input": "1 and 2", "output": "3"}
{"prompt": "Ship: ", "completion": "a vessel that sails the sea"}
{"text": "Plain text to go on from."}`;
const PICTURES_EXAMPLE = `{"file_name": "1.png", "text": "a red kite over a green hill"}
{"file_name": "2.jpg", "text": "a blue kite on the ground"}`;

interface Props {
  kind: DataKind; // what the chosen model learns from
  value: string | null;
  onChange: (id: string | null) => void;
}

export function DataPicker({ kind, value, onChange }: Props) {
  const { t } = useTranslation();
  const [gathering, setGathering] = useState<readonly Picked[] | null>(null);
  const ofPictures = kind === 'pictures';
  const uploading = useUpload('fine-tune', (added) => {
    if (added.kind === kind) onChange(added.id);
  });
  const { sending, name } = uploading;
  return (
    <div className={css.picker}>
      <Text size="sm" c="dimmed">
        {t(ofPictures ? 'pictured.dataText' : 'training.dataText')}
      </Text>
      <FilePicker
        uploading={uploading}
        drop={t(ofPictures ? 'pictured.drop' : 'training.drop')}
        choices={
          ofPictures
            ? [
                { label: t('pictured.chooseZip'), accept: '.zip,application/zip' },
                { label: t('pictured.chooseFiles'), accept: '.png,.jpg,.jpeg,.webp,.txt', several: true },
                { label: t('pictured.chooseFolder'), several: true, folder: true },
              ]
            : [{ label: t('training.choose'), accept: '.jsonl,.json,.csv,.tsv,.txt,.md,application/jsonl' }]
        }
        onTake={(chosen) => {
          if (ofPictures && chosen[0] && !isZip(chosen[0].file)) setGathering(chosen);
          else if (chosen[0]) sending.mutate(chosen[0].file);
        }}
        fits={(each) => each.kind === kind}
        rows={(count) => t(ofPictures ? 'pictured.rows' : 'training.rows', { count })}
        value={value}
        onChange={onChange}
      >
        {gathering && ofPictures ? (
          <GatherPictures
            key={gathering.map(({ path }) => path).join('\n')}
            picked={gathering}
            onZip={(zip) => {
              setGathering(null);
              sending.mutate(zip);
            }}
            onDismiss={() => setGathering(null)}
          />
        ) : null}
        {sending.data && sending.data.kind !== kind ? (
          <Alert color="yellow" variant="light" icon={<Icon name="warning" />} role="status">
            {t('pictured.wrongKind', { name, kind: t(`pictured.kind_${sending.data.kind}`) })}
          </Alert>
        ) : null}
      </FilePicker>
      <Fold title={t(ofPictures ? 'pictured.format' : 'training.dataFormat')}>
        {ofPictures ? (
          <Text size="sm" mb="xs">
            {t('pictured.formatText')}
          </Text>
        ) : null}
        <CopyText
          text={ofPictures ? PICTURES_EXAMPLE : EXAMPLE}
          label={t(ofPictures ? 'pictured.format' : 'training.dataFormat')}
        />
      </Fold>
    </div>
  );
}
